"""Sources of text: local files, `datasets`, and mixtures of them."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqeff.checks import UserError, check_types, require
from seqeff.data.document import Document, Source
from seqeff.data.files import decode_utf8, describe_files, find_files, nearest, read_bytes
from seqeff.paths import LocalPathOrName, LocalPattern

_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """UTF-8 text files, a file a document.

    Attributes:
      paths: files or glob patterns (`corpus/**/*.txt`).
    """

    paths: tuple[LocalPattern, ...]

    def __post_init__(self) -> None:
        check_types(self)
        _require_paths(self)

    def documents(self) -> Iterator[Document]:
        for path in find_files(self.paths, "TextFiles.paths"):
            yield Document(decode_utf8(read_bytes(path), str(path)))

    def fingerprint(self) -> dict[str, Any]:
        files = describe_files(find_files(self.paths, "TextFiles.paths"))
        return {"kind": "TextFiles", "files": files}


@dataclass(frozen=True, kw_only=True)
class JsonlFiles:
    """Files with a JSON object a line, an object a document.

    Attributes:
      paths: files or glob patterns.
      text: the field that holds the text.
      prompt, completion: for fine-tuning, in place of `text`; the loss counts on the completion.
    """

    paths: tuple[LocalPattern, ...]
    text: str = "text"
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _require_paths(self)
        _columns(self)

    def documents(self) -> Iterator[Document]:
        columns = _columns(self)
        for path in find_files(self.paths, "JsonlFiles.paths"):
            for place, line in _lines(path):
                yield _document(_parse(line, place), columns, "JsonlFiles", place)

    def fingerprint(self) -> dict[str, Any]:
        files = describe_files(find_files(self.paths, "JsonlFiles.paths"))
        return {"kind": "JsonlFiles", "files": files, "columns": _columns(self)}


@dataclass(frozen=True, kw_only=True)
class ParquetFiles:
    """Parquet files, a row a document.

    Attributes:
      paths: files or glob patterns.
      text: the column that holds the text.
      prompt, completion: for fine-tuning, in place of `text`; the loss counts on the completion.
    """

    paths: tuple[LocalPattern, ...]
    text: str = "text"
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _require_paths(self)
        _columns(self)

    def documents(self) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        columns = _columns(self)
        for path in find_files(self.paths, "ParquetFiles.paths"):
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    present = file.schema_arrow.names
                    _require_columns(present, columns, "ParquetFiles", str(path))
                    batches = file.iter_batches(_ROWS, columns=list(columns.values()))
                    records = itertools.chain.from_iterable(b.to_pylist() for b in batches)
                    for row, record in enumerate(records):
                        yield _document(record, columns, "ParquetFiles", f"{path} row {row}")
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"cannot read {path} as Parquet: {_first_line(error)}") from error

    def fingerprint(self) -> dict[str, Any]:
        files = describe_files(find_files(self.paths, "ParquetFiles.paths"))
        return {"kind": "ParquetFiles", "files": files, "columns": _columns(self)}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceDataset:
    """A dataset of the Hugging Face hub, or a local folder that `datasets` reads; a row a document.

    Attributes:
      name: as for `datasets.load_dataset`, or a folder written by `Dataset.save_to_disk`.
      config: the dataset's configuration, where it has several.
      split: for example `"train"` or `"train[:1%]"`.
      revision: a commit or tag of the hub's repository.
      text: the column that holds the text.
      prompt, completion: for fine-tuning, in place of `text`; the loss counts on the completion.
    """

    name: LocalPathOrName
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _columns(self)

    def documents(self) -> Iterator[Document]:
        columns = _columns(self)
        dataset = self._load()
        dataset = dataset.select_columns(list(columns.values()))
        for row, record in enumerate(dataset):
            yield _document(record, columns, "HuggingFaceDataset", f"{self.name} row {row}")

    def fingerprint(self) -> dict[str, Any]:
        dataset = self._load()
        return {
            "kind": "HuggingFaceDataset",
            "dataset": dataset._fingerprint,
            "columns": _columns(self),
        }

    def _load(self) -> Any:
        dataset = _load_dataset(self.name, self.config, self.split, self.revision)
        _require_columns(dataset.column_names, _columns(self), "HuggingFaceDataset", self.name)
        return dataset


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources, each with its share of the rows of every batch stream.

    Each source runs through its own epochs.

    Attributes:
      sources: what is mixed; may be mixtures themselves.
      weights: positive, one a source, of any sum.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.sources) > 0, "Mixture.sources is empty; give at least one source")
        require(
            len(self.weights) == len(self.sources),
            f"Mixture.weights = {tuple(self.weights)} has {len(self.weights)} entries for "
            f"{len(self.sources)} sources; give one weight a source",
        )
        require(
            all(weight > 0 and math.isfinite(weight) for weight in self.weights),
            f"Mixture.weights = {tuple(self.weights)}: every weight must be positive and finite",
        )

    def components(self) -> list[tuple[Source, float]]:
        """The sources that are not mixtures, with shares that sum to one."""
        total = sum(self.weights)
        components: list[tuple[Source, float]] = []
        for source, weight in zip(self.sources, self.weights, strict=True):
            inner = source.components() if isinstance(source, Mixture) else [(source, 1.0)]
            components.extend((part, share * weight / total) for part, share in inner)
        return components

    def documents(self) -> Iterator[Document]:
        """The sources' documents in turns, whatever the weights, each document once."""
        iterators = [source.documents() for source in self.sources]
        for turn in itertools.zip_longest(*iterators):
            yield from (document for document in turn if document is not None)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "Mixture", "sources": [source.fingerprint() for source in self.sources]}


@dataclass(frozen=True, kw_only=True)
class NoText:
    """The source of an imported run: its documents are not known."""

    def documents(self) -> Iterator[Document]:
        raise self._refusal()

    def fingerprint(self) -> dict[str, Any]:
        raise self._refusal()

    def _refusal(self) -> UserError:
        return UserError(
            "Data.source = NoText: an imported model comes without documents; to score it, add "
            "--gin.Data.validation='@TextFiles()' --gin.TextFiles.paths=\"('FILE',)\"; to train "
            "it, begin a run with Train.parent"
        )


def _require_paths(source: TextFiles | JsonlFiles | ParquetFiles) -> None:
    name = type(source).__name__
    require(len(source.paths) > 0, f"{name}.paths is empty; give at least one file or pattern")


def _columns(source: JsonlFiles | ParquetFiles | HuggingFaceDataset) -> dict[str, str]:
    """Names of the columns by the field of `Document` that they fill."""
    if source.prompt is None and source.completion is None:
        return {"text": source.text}
    if source.prompt is None or source.completion is None:
        name = type(source).__name__
        missing = "prompt" if source.prompt is None else "completion"
        require(False, f"{name}.{missing} is null; give both prompt and completion, or neither")
    return {"prompt": str(source.prompt), "text": str(source.completion)}


def _require_columns(
    present: Iterable[str], columns: Mapping[str, str], kind: str, place: str
) -> None:
    present = list(present)
    for name in columns.values():
        if name not in present:
            raise UserError(
                f"{kind}: {place} has no column {name!r}; its columns are "
                f"{', '.join(map(repr, present)) or 'none'}{nearest(name, present)}"
            )


def _document(
    record: Mapping[str, Any], columns: Mapping[str, str], kind: str, place: str
) -> Document:
    values = {}
    for field, name in columns.items():
        value = record.get(name)
        if name not in record:
            _require_columns(record, columns, kind, place)
        if not isinstance(value, str):
            raise UserError(
                f"{kind}: {place}: column {name!r} holds {_type_name(value)}, not a string"
            )
        if not _is_unicode(value):
            raise UserError(
                f"{kind}: {place}: column {name!r} holds a lone surrogate, which is no character"
            )
        values[field] = value
    return Document(**values)


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                text = decode_utf8(line, place)
                if text.strip():
                    yield place, text
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{place} is not valid JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise UserError(f"{place} holds {_type_name(record)}; give one JSON object a line")
    return record


def _type_name(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@functools.lru_cache(maxsize=8)
def _load_dataset(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    folder = Path(name).expanduser()
    try:
        if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(str(folder))
            if isinstance(dataset, datasets.DatasetDict):
                return _saved_split(dict(dataset), name, split)
            return dataset
        return datasets.load_dataset(name, config, split=split, revision=revision)
    # the last is what a dataset that needs a script raises
    except (OSError, ValueError, DatasetsError, RuntimeError) as error:
        raise UserError(
            f"HuggingFaceDataset.name = {name!r} (config {config!r}, split {split!r}) cannot be "
            f"loaded: {_first_line(error)}"
        ) from error


def _saved_split(splits: Mapping[Any, Any], name: str, split: str) -> Any:
    if split not in splits:
        present: Sequence[str] = list(splits)
        raise UserError(
            f"HuggingFaceDataset.split = {split!r}: {name} has the splits "
            f"{', '.join(map(repr, present))}{nearest(split, present)}"
        )
    return splits[split]
