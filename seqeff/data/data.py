"""The config of a run's data, and its preparation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seqeff.checks import UserError, check_types, require
from seqeff.data.batches import Batches, EvaluationBatches, Packing
from seqeff.data.build import Stores, build_store, is_held_out
from seqeff.data.cache import cache_root
from seqeff.data.document import Source
from seqeff.data.sources import Mixture
from seqeff.data.store import TokenStore
from seqeff.data.tokenizer import Tokenizer
from seqeff.data.tokenizer_config import TokenizerConfig
from seqeff.paths import LocalPath


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on and how it is cut in batches.

    Attributes:
      source: the text; a `Mixture` for several.
      tokenizer: `TokenizerFile` or `TrainBPE`.
      sequence_length: positions of a row.
      batch_size: rows of a batch, over all devices and hosts.
      validation: text of its own for validation; null holds documents of `source` out.
      holdout: share of each source's documents, at least one of them, that is held out; 0 goes
        without validation. Of no effect where `validation` is given.
      packing: `"split"` cuts documents at the ends of rows and wastes nothing; `"whole"` cuts only
        documents longer than a row and pads.
      separate_documents: whether positions see only their own document.
      seed: of the order of documents and rows.
      cache: folder for tokenised text; null means `$SEQEFF_CACHE`, else `~/.cache/seqeff`.
      prefetch: batches that wait on the device.
    """

    source: Source
    tokenizer: TokenizerConfig
    sequence_length: int
    batch_size: int
    validation: Source | None = None
    holdout: float = 0.01
    packing: Packing = "split"
    separate_documents: bool = True
    seed: int = 0
    cache: LocalPath | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("sequence_length", "batch_size", "prefetch"):
            value = getattr(self, name)
            require(value >= 1, f"Data.{name} = {value} must be at least 1")
        require(
            0 <= self.holdout < 1,
            f"Data.holdout = {self.holdout} is a share of the documents: at least 0, below 1",
        )
        require(
            0 <= self.seed < 2**63, f"Data.seed = {self.seed} must be at least 0 and below 2**63"
        )


class PreparedData(NamedTuple):
    """Data ready for training.

    Attributes:
      tokenizer: of the run.
      train: the endless stream of training batches.
      validation: one pass over the validation documents, or None.
      train_stores, validation_stores: the tokenised text, one a source.
      fingerprint: JSON with the hashes of the tokenizer and of each store's documents; see
        `fingerprint_without_documents`.
    """

    tokenizer: Tokenizer
    train: Batches
    validation: EvaluationBatches | None
    train_stores: tuple[TokenStore, ...]
    validation_stores: tuple[TokenStore, ...]
    fingerprint: dict[str, Any]


def prepare(
    data: Data,
    tokenizer: Tokenizer | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> PreparedData:
    """Makes or finds the tokenizer and the tokenised text.

    Args:
      data: the config.
      tokenizer: of an existing run, used in place of the config's.
      fingerprint: `PreparedData.fingerprint` of that run.

    Raises:
      UserError: bad input, a cache that cannot be written, or a tokenizer or documents that are
        not those of the run.
    """
    cache = cache_root(data.cache)
    holdout = _holdout(data)
    if tokenizer is None:
        tokenizer = _build_tokenizer(data, holdout, cache)
    else:
        data.tokenizer.check(tokenizer)
    stores = _build(data.source, tokenizer, cache, holdout)
    train = tuple(store.train for store in stores)
    validation = _validation_stores(data, tokenizer, cache, stores)
    found = {
        "tokenizer": tokenizer.fingerprint,
        "train": _contents(train),
        "validation": _contents(validation),
    }
    _compare(fingerprint or found, found)
    return PreparedData(
        tokenizer=tokenizer,
        train=Batches(
            train,
            weights=[weight for _, weight in _components(data.source)],
            sequence_length=data.sequence_length,
            batch_size=data.batch_size,
            seed=data.seed,
            packing=data.packing,
            separate_documents=data.separate_documents,
        ),
        validation=_evaluation_batches(data, validation),
        train_stores=train,
        validation_stores=validation,
        fingerprint=found,
    )


def fingerprint_without_documents(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run that was not trained here has for `PreparedData.fingerprint`."""
    return {"tokenizer": tokenizer.fingerprint, "train": None, "validation": None}


def prepare_validation(
    data: Data, tokenizer: Tokenizer, fingerprint: Mapping[str, Any]
) -> EvaluationBatches | None:
    """The same as `prepare(...).validation`, without the training documents.

    A source that validation documents are held out of is still read, unless the cache holds it.

    Args:
      data: the config.
      tokenizer: of an existing run.
      fingerprint: `PreparedData.fingerprint` of that run.

    Raises:
      UserError: as for `prepare`.
    """
    data.tokenizer.check(tokenizer)
    cache, holdout = cache_root(data.cache), _holdout(data)
    stores = _build(data.source, tokenizer, cache, holdout) if holdout else []
    validation = _validation_stores(data, tokenizer, cache, stores)
    found = {"tokenizer": tokenizer.fingerprint, "validation": _contents(validation)}
    _compare(fingerprint, found)
    return _evaluation_batches(data, validation)


def _holdout(data: Data) -> float:
    return data.holdout if data.validation is None else 0.0


def _build(source: Source, tokenizer: Tokenizer, cache: Path, holdout: float) -> list[Stores]:
    return [build_store(part, tokenizer, cache, holdout) for part, _ in _components(source)]


def _validation_stores(
    data: Data, tokenizer: Tokenizer, cache: Path, stores: Sequence[Stores]
) -> tuple[TokenStore, ...]:
    """Those of the validation source if there is one, else what the stores hold out."""
    if data.validation is not None:
        return tuple(store.train for store in _build(data.validation, tokenizer, cache, 0.0))
    return tuple(store.validation for store in stores if store.validation is not None)


def _evaluation_batches(data: Data, stores: Sequence[TokenStore]) -> EvaluationBatches | None:
    if not stores:
        return None
    return EvaluationBatches(
        stores,
        sequence_length=data.sequence_length,
        batch_size=data.batch_size,
        packing=data.packing,
        separate_documents=data.separate_documents,
    )


def _build_tokenizer(data: Data, holdout: float, cache: Path) -> Tokenizer:
    def texts() -> Iterator[str]:
        for document in data.source.documents():
            if not is_held_out(document, holdout):
                yield from filter(None, (document.prompt, document.text))

    corpus = {"source": data.source.fingerprint(), "holdout": holdout}
    return data.tokenizer.build(texts, corpus, cache)


def _components(source: Source) -> list[tuple[Source, float]]:
    return source.components() if isinstance(source, Mixture) else [(source, 1.0)]


def _contents(stores: Sequence[TokenStore]) -> list[str]:
    return [store.part.content for store in stores]


def _compare(run: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    subjects = {
        "tokenizer": "the tokenizer differs from the one",
        "train": "the training documents differ from those",
        "validation": "the validation documents differ from those",
    }
    for name, value in found.items():
        # the null of an imported run goes with any documents
        if run.get(name, "") not in (value, None):
            raise UserError(
                f"{subjects[name]} that the run was started with; restore them, or start a new run"
            )
