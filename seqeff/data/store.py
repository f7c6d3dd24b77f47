"""Tokenised corpora on disk: memory-mapped shards of documents, described by a manifest.

A store directory holds `manifest.json` and a folder a part (`train`, and `validation` if some
documents are held out). A part holds shards of little-endian unsigned integers, `lengths.npy` with
the length of every document, and `prompts.npy` with the lengths of prompts if there are any.
Each document is stored as `[begin_of_text] + tokens`, with the end of text as its last token where
that is another id, and each shard closes with one more `begin_of_text`, so that the entry after any
entry of a document is its target.

Opening compares the sizes of files with the manifest and hashes nothing: a store appears by one
rename of files that were already flushed, so it is whole, and a hash would read all of a large
corpus at every start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt

from seqeff.checks import UserError

FORMAT = 3
MANIFEST = "manifest.json"
LENGTHS = "lengths.npy"
PROMPTS = "prompts.npy"


class Shard(NamedTuple):
    """A file of a part.

    Attributes:
      name: of the file.
      documents: how many it holds.
      tokens: of its documents, each with its end of text; the file holds one entry more.
    """

    name: str
    documents: int
    tokens: int


class Part(NamedTuple):
    """What the manifest says of one part.

    Attributes:
      content: SHA-256 over the documents' own hashes, in order.
      documents: how many the part holds.
      tokens: of all documents, each with its end of text.
      bytes: of the documents' UTF-8 text, prompts included.
      prompts: whether any document has a prompt.
      shards: the files in order.
    """

    content: str
    documents: int
    tokens: int
    bytes: int
    prompts: bool
    shards: tuple[Shard, ...]


class Manifest(NamedTuple):
    """The contents of `manifest.json`.

    Attributes:
      tokenizer: fingerprint of the tokenizer.
      begin_of_text: its id that opens every document.
      dtype: of the shards, `"uint16"` or `"uint32"`.
      source: fingerprint of the source.
      holdout: the share of documents that was asked for validation.
      parts: by name.
    """

    tokenizer: str
    begin_of_text: int
    dtype: str
    source: dict[str, Any]
    holdout: float
    parts: dict[str, Part]

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        parts = {
            name: {**part._asdict(), "shards": [shard._asdict() for shard in part.shards]}
            for name, part in self.parts.items()
        }
        return json.dumps({"format": FORMAT, **self._asdict(), "parts": parts}, indent=2)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads `manifest.json` of a store directory; a `UserError` if it is damaged."""
        path = directory / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT:
                raise ValueError("of another format version")
            for name, part in fields["parts"].items():
                shards = tuple(Shard(**shard) for shard in part.pop("shards"))
                fields["parts"][name] = Part(**part, shards=shards)
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, str(error)) from error


class TokenStore:
    """One part of a store, opened for reading.

    Attributes:
      directory: of the part.
      manifest: of the whole store.
      part: what the manifest says of this part.
      lengths: entries of each document, its end of text included.
      starts: where each document begins, counted over all shards.
      prompt_lengths: tokens of each document's prompt, or None if no document has one.
      shards: memory-mapped; the last entry of each belongs to no document.
      shard_starts: where each shard begins, counted as `starts` are.
    """

    directory: Path
    manifest: Manifest
    part: Part
    lengths: Int32[np.ndarray, " documents"]
    starts: Int64[np.ndarray, " documents"]
    prompt_lengths: Int32[np.ndarray, " documents"] | None
    shards: list[UInt[np.ndarray, " entries"]]
    shard_starts: Int64[np.ndarray, " shards"]

    def __init__(self, directory: Path, name: str) -> None:
        """Opens a part of a store directory.

        Raises:
          UserError: a file is missing, or its size differs from the manifest's.
        """
        self.manifest = Manifest.read(directory)
        self.directory = directory / name
        self.part = self.manifest.parts[name]
        self.shards = [self._open(shard) for shard in self.part.shards]
        sizes = [len(shard) for shard in self.shards]
        self.shard_starts = np.concatenate([[0], np.cumsum(sizes[:-1])]).astype(np.int64)
        self.lengths = self._read(LENGTHS)
        if self.lengths.sum(dtype=np.int64) != self.part.tokens:
            raise _damaged(self.directory / LENGTHS, "its lengths do not add up")
        earlier_shards = np.repeat(
            np.arange(len(self.shards)), [shard.documents for shard in self.part.shards]
        )
        ends = np.cumsum(self.lengths, dtype=np.int64)
        self.starts = ends - self.lengths + earlier_shards
        self.prompt_lengths = self._read(PROMPTS) if self.part.prompts else None

    @property
    def begin_of_text(self) -> int:
        """The id that opens every document."""
        return self.manifest.begin_of_text

    def document(self, index: int) -> UInt[np.ndarray, " length"]:
        """The tokens of a document, prompt included, without the one that opens it."""
        shard = int(np.searchsorted(self.shard_starts, self.starts[index], side="right")) - 1
        begin = int(self.starts[index] - self.shard_starts[shard])
        return self.shards[shard][begin + 1 : begin + int(self.lengths[index])]

    def _open(self, shard: Shard) -> UInt[np.ndarray, " entries"]:
        path = self.directory / shard.name
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        expected = (shard.tokens + 1) * dtype.itemsize
        try:
            size = path.stat().st_size
            if size != expected:
                raise _damaged(path, f"it has {size} bytes where the manifest says {expected}")
            return np.memmap(path, dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error

    def _read(self, name: str) -> Int32[np.ndarray, " documents"]:
        path = self.directory / name
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, str(error)) from error
        if array.shape != (self.part.documents,):
            raise _damaged(path, f"{array.shape} entries for {self.part.documents} documents")
        return array


def _damaged(path: Path, reason: str) -> UserError:
    folder = path.parent if path.name == MANIFEST else path.parent.parent
    return UserError(
        f"{path} is damaged: {reason}; delete {folder} and start again, which rebuilds it"
    )
