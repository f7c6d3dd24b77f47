"""Tokenises a source, once, into a store."""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32
from tqdm import tqdm

from seqeff.checks import UserError
from seqeff.data.cache import build_once, cache_key, writing_to
from seqeff.data.document import Document, Source
from seqeff.data.store import FORMAT, LENGTHS, MANIFEST, PROMPTS, Manifest, Part, Shard, TokenStore
from seqeff.data.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 27
_BATCH_CHARACTERS = 1 << 21
_BATCH_DOCUMENTS = 1 << 14


class Stores:
    """The parts of a source's store, each opened when it is first asked for."""

    def __init__(self, directory: Path, holdout: float) -> None:
        self._directory, self._holdout = directory, holdout

    @functools.cached_property
    def train(self) -> TokenStore:
        return TokenStore(self._directory, "train")

    @functools.cached_property
    def validation(self) -> TokenStore | None:
        """None where nothing is held out."""
        return TokenStore(self._directory, "validation") if self._holdout else None


def build_store(source: Source, tokenizer: Tokenizer, cache: Path, holdout: float = 0.0) -> Stores:
    """The store of a source, built unless the cache holds it.

    Args:
      source: where the documents come from; those without any text are left out.
      tokenizer: makes tokens of them.
      cache: the folder that keeps stores.
      holdout: share of the documents, at least one, that goes to validation. A hash of its content
        decides for each document, so that copies of one stay together.

    Raises:
      UserError: the source is empty or too small to hold out from, or the cache cannot be written.
    """
    description = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
        "holdout": holdout,
    }
    directory = cache / "stores" / cache_key(description)
    build_once(directory, lambda partial: _build(partial, source, tokenizer, holdout))
    return Stores(directory, holdout)


def is_held_out(document: Document, holdout: float) -> bool:
    """Whether the hash of a document falls into the share that is held out."""
    return _rank(_digest(document)) < _threshold(holdout)


class PartWriter:
    """Writes one part of a store, in groups of documents."""

    def __init__(self, directory: Path, dtype: str, begin_of_text: int, shard_tokens: int) -> None:
        """Starts a part in a new directory; a shard is closed before it exceeds `shard_tokens`."""
        self._directory = directory
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._begin_of_text = np.array([begin_of_text], self._dtype)
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._lengths: list[np.ndarray] = []
        self._prompts: list[np.ndarray] = []
        self._open_tokens = self._open_documents = 0
        with writing_to(directory):
            directory.mkdir()

    def append(
        self,
        tokens: Int[np.ndarray, " entries"],
        lengths: Int32[np.ndarray, " documents"],
        prompt_lengths: Int32[np.ndarray, " documents"],
    ) -> None:
        """Adds documents to one shard.

        Args:
          tokens: the documents one after the other, each opened by the begin of text.
          lengths: entries of each document.
          prompt_lengths: tokens of each document's prompt.
        """
        if self._open_tokens and self._open_tokens + len(tokens) > self._shard_tokens:
            self._close_shard()
        with writing_to(self._directory):
            self._write(tokens.astype(self._dtype))
        self._open_tokens += len(tokens)
        self._open_documents += len(lengths)
        self._lengths.append(lengths)
        self._prompts.append(prompt_lengths)

    def finish(self, content: str, text_bytes: int) -> Part:
        """Closes the part and describes it."""
        if self._open_tokens:
            self._close_shard()
        lengths = np.concatenate(self._lengths or [np.zeros(0)]).astype(np.int32)
        prompts = np.concatenate(self._prompts or [np.zeros(0)]).astype(np.int32)
        with writing_to(self._directory):
            np.save(self._directory / LENGTHS, lengths)
            if prompts.any():
                np.save(self._directory / PROMPTS, prompts)
        return Part(
            content=content,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            bytes=text_bytes,
            prompts=bool(prompts.any()),
            shards=tuple(self._shards),
        )

    @property
    def _open_name(self) -> str:
        return f"{len(self._shards):05d}.bin"

    def _close_shard(self) -> None:
        with writing_to(self._directory):
            self._write(self._begin_of_text)
        self._shards.append(Shard(self._open_name, self._open_documents, self._open_tokens))
        self._open_tokens = self._open_documents = 0

    def _write(self, entries: np.ndarray) -> None:
        with open(self._directory / self._open_name, "ab") as file:
            file.write(entries.tobytes())


def token_dtype(vocabulary_size: int) -> str:
    """The smaller of `"uint16"` and `"uint32"` that holds every id."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def _build(directory: Path, source: Source, tokenizer: Tokenizer, holdout: float) -> None:
    parts, smallest = _tokenise(directory, source, tokenizer, holdout, _threshold(holdout))
    if smallest is None:
        raise UserError(f"{_name(source)} is empty: none of its documents holds any text")
    if not all(part.documents for part in parts.values()):
        # so few documents that none, or all, of their hashes fall into the share
        for name in parts:
            shutil.rmtree(directory / name)
        parts, _ = _tokenise(directory, source, tokenizer, holdout, smallest + 1)
    if not parts["train"].documents:
        raise UserError(
            f"{_name(source)} has a single document, which cannot be both trained on and held "
            "out; give a validation source, or set the holdout to 0"
        )
    manifest = Manifest(
        tokenizer=tokenizer.fingerprint,
        begin_of_text=tokenizer.begin_of_text,
        dtype=token_dtype(tokenizer.vocabulary_size),
        source=source.fingerprint(),
        holdout=holdout,
        parts=parts,
    )
    with writing_to(directory):
        (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _tokenise(
    directory: Path, source: Source, tokenizer: Tokenizer, holdout: float, threshold: int
) -> tuple[dict[str, Part], int | None]:
    """Writes the parts; also returns the smallest rank of a document, None if there is none."""
    names = ("train", "validation") if holdout else ("train",)
    builders = {name: _PartBuilder(directory / name, tokenizer) for name in names}
    smallest = None
    with tqdm(desc=f"tokenise {_name(source)}", unit="B", unit_scale=True, disable=None) as bar:
        for document in source.documents():
            if not (document.text or document.prompt):
                continue
            digest = _digest(document)
            rank = _rank(digest)
            smallest = rank if smallest is None else min(smallest, rank)
            name = "validation" if rank < threshold else "train"
            bar.update(builders[name].add(document, digest))
        return {name: builder.finish() for name, builder in builders.items()}, smallest


class _PartBuilder:
    """Collects documents until they make a batch worth encoding, and keeps count."""

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        dtype = token_dtype(tokenizer.vocabulary_size)
        self._writer = PartWriter(directory, dtype, tokenizer.begin_of_text, SHARD_TOKENS)
        self._tokenizer = tokenizer
        self._content = hashlib.sha256()
        self._bytes = 0
        self._pending: list[Document] = []
        self._pending_characters = 0

    def add(self, document: Document, digest: bytes) -> int:
        """Adds a document; returns its size in bytes."""
        size = len(document.prompt.encode()) + len(document.text.encode())
        self._content.update(digest)
        self._bytes += size
        self._pending.append(document)
        self._pending_characters += len(document.prompt) + len(document.text)
        full = self._pending_characters >= _BATCH_CHARACTERS
        if full or len(self._pending) >= _BATCH_DOCUMENTS:
            self._encode()
        return size

    def finish(self) -> Part:
        """Encodes what is left and closes the part."""
        if self._pending:
            self._encode()
        return self._writer.finish(self._content.hexdigest(), self._bytes)

    def _encode(self) -> None:
        texts = self._tokenizer.encode_batch([document.text for document in self._pending])
        prompts = self._tokenizer.encode_batch([document.prompt for document in self._pending])
        opening, closing = (self._tokenizer.begin_of_text,), self._tokenizer.document_ends
        documents = [
            [*opening, *prompt, *text, *closing]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        lengths = [len(document) for document in documents]
        entries = itertools.chain.from_iterable(documents)
        self._writer.append(
            np.fromiter(entries, np.int64, sum(lengths)),
            np.array(lengths, np.int32),
            np.array([len(prompt) for prompt in prompts], np.int32),
        )
        self._pending, self._pending_characters = [], 0


def _name(source: Source) -> str:
    return type(source).__name__


def _digest(document: Document) -> bytes:
    prompt = document.prompt.encode()
    content = hashlib.sha256(len(prompt).to_bytes(8, "big"))
    content.update(prompt)
    content.update(document.text.encode())
    return content.digest()


def _rank(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def _threshold(holdout: float) -> int:
    return int(holdout * 2**64)
