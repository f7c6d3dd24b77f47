"""Files of named tensors: safetensors, and PyTorch's where only those are; one file or several."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from seqeff.checks import UserError
from seqeff.data.files import require_content
from seqeff.interop.settings import Settings

_INDEX = ".index.json"
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"
_FLOATS = (
    *("F64", "F32", "F16", "BF16"),
    *("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"),
)


class Entry(NamedTuple):
    """A tensor in a file.

    Attributes:
      shape: of it.
      type: as the file names it.
      is_float: whether `WeightFiles.read` can read it.
    """

    shape: tuple[int, ...]
    type: str
    is_float: bool


class _File(Protocol):
    """An open file of tensors."""

    entries: Mapping[str, Entry]

    def read(self, name: str) -> np.ndarray: ...


class WeightFiles:
    """The tensors of a directory, read one at a time.

    Attributes:
      entries: by name.
    """

    def __init__(self, files: Iterable[_File]) -> None:
        self._file_of = {name: file for file in files for name in file.entries}
        self.entries = {name: file.entries[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor of floating-point numbers, of any type."""
        return self._file_of[name].read(name)


@contextlib.contextmanager
def open_weights(directory: Path) -> Iterator[WeightFiles]:
    """The weights of a directory.

    Raises:
      UserError: there are none, files or tensors of an index are missing, or a file is damaged.
    """
    for single, opened in ((_SAFETENSORS, _safetensors), (_TORCH, _torch)):
        listed = _listed(directory, single)
        if not listed:
            continue
        with contextlib.ExitStack() as stack:
            files = []
            for path in (directory / file for file in sorted(listed)):
                _require_fetched(path)
                files.append(stack.enter_context(opened(path)))
            weights = WeightFiles(files)
            absent = sorted(set().union(*listed.values()) - weights.entries.keys())
            if absent:
                index = directory / (single + _INDEX)
                raise UserError(f"{index} lists tensors that its files lack: {some(absent)}")
            yield weights
            return
    names = ", ".join(f"{name} or {name}{_INDEX}" for name in (_SAFETENSORS, _TORCH))
    raise UserError(f"{directory} holds no weights: no {names}; download them")


def write_weights(
    directory: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes tensors as safetensors, in several files with an index where one would be too large.

    Args:
      sizes: bytes of each tensor, in the order in which they are written.
      read: makes the array of a tensor.
      shard_bytes: a file has at most so many, unless a tensor alone has more.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    files = [_SAFETENSORS]
    if len(shards) > 1:
        files = [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / (_SAFETENSORS + _INDEX)).write_text(text, encoding="utf-8")
    for file, names in zip(files, shards, strict=True):
        arrays = {name: np.ascontiguousarray(read(name)) for name in names}
        # transformers refuses files that do not name a framework
        save_file(arrays, directory / file, metadata={"format": "pt"})
        # the library lets nobody else read it
        (directory / file).chmod(directory.stat().st_mode & 0o666)


def some(names: Iterable[str], shown: int = 5) -> str:
    """The first of several names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _listed(directory: Path, single: str) -> dict[str, set[str]]:
    """Files of a kind, with the tensors that an index says to be in each; empty if there are none.

    Args:
      single: what the file is called where there is one.
    """
    if (directory / single).is_file():
        return {single: set()}
    index = directory / (single + _INDEX)
    if not index.is_file():
        return {}
    found = Settings.load(index).part("weight_map")
    if found is None:
        raise UserError(f"{index} has no weight_map; download it again")
    listed: dict[str, set[str]] = {}
    for name, file in found.values.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: the file of {name} is {file!r}, which is no file beside it")
        if not (directory / file).is_file():
            raise UserError(f"{index} lists {file}, which is not there; download it")
        listed.setdefault(file, set()).add(name)
    return listed


def _require_fetched(file: Path) -> None:
    try:
        with open(file, "rb") as opened:
            require_content(file, opened.read(100))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _entry(shape: Iterable[int], type_name: str) -> Entry:
    return Entry(tuple(shape), type_name, type_name in _FLOATS)


class _Safetensors:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        self.entries: Mapping[str, Entry] = {
            name: _entry(part.get_shape(), part.get_dtype()) for name, part in slices.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._handle.get_tensor(name)


@contextlib.contextmanager
def _safetensors(file: Path) -> Iterator[_File]:
    try:
        handle = safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}; download it again") from error
    with handle:
        yield _Safetensors(handle)


class _Torch:
    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self.entries: Mapping[str, Entry] = {
            name: _entry(tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].detach().float().numpy()


@contextlib.contextmanager
def _torch(file: Path) -> Iterator[_File]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            f"{file} needs PyTorch to be read: pip install torch, or give a directory with "
            "safetensors"
        ) from error
    try:
        # weights_only: tensors, and no code
        tensors = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot read {file} as tensors alone: {reason}") from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{file} holds more than tensors by their names; give a state dict")
    yield _Torch(tensors)
