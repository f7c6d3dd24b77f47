"""Perplexity of texts without end, in memory that does not grow with them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from seqeff.checks import UserError
from seqeff.evaluation.perplexity import Perplexity
from seqeff.models import (
    Cache,
    CachedTransformer,
    DenseAttention,
    TransformerConfig,
    cached_parameters,
    empty_cache,
    token_losses,
)
from seqeff.models.caches import kind_of
from seqeff.models.caches.files import load_cache, save_cache
from seqeff.models.flops import abstract_model, entries_of_cache

_CHUNK = 512
# rows that the model without a stream reads at a time
_ROWS = 8


class Book(NamedTuple):
    """A text: its name, and its tokens, the end of text before them."""

    name: str
    tokens: Int[np.ndarray, " tokens"]

    @property
    def sha256(self) -> str:
        """Of the token ids, as little-endian int32."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


class Sums(NamedTuple):
    """Over tokens: their loss, their number, their bytes; entries read, and the most resident."""

    nats: Float[Array, ""]
    tokens: Float[Array, ""]
    bytes: Float[Array, ""]
    read: Float[Array, ""]
    resident: Float[Array, ""]


@dataclass(frozen=True)
class StreamResult:
    """What a text costs.

    Attributes:
      seconds: on the clock, compilation not included.
      device_bytes: of the program that reads it: parameters, cache, a chunk's activations.
    """

    perplexity: Perplexity
    seconds: float
    device_bytes: int

    @classmethod
    def of(cls, parts: Float[np.ndarray, "parts 6"], device_bytes: int) -> StreamResult:
        """From rows of the attributes of `Perplexity`, and the seconds."""
        return cls(Perplexity.of(parts[:, :5]), float(parts[:, 5].sum()), device_bytes)

    @classmethod
    def total(cls, results: Sequence[StreamResult]) -> StreamResult:
        """Of several texts."""
        parts = [(*dataclasses.astuple(part.perplexity), part.seconds) for part in results]
        most = max(part.device_bytes for part in results)
        return cls.of(np.asarray(parts, np.float64), most)

    def as_metrics(self) -> dict[str, float]:
        """For reports."""
        speed = self.perplexity.tokens / max(self.seconds, 1e-9)
        return {
            **self.perplexity.as_metrics(),
            "seconds": self.seconds,
            "tokens_per_second": speed,
            "device_bytes": self.device_bytes,
        }


class Stream:
    """Reads texts through a model's caches, a chunk at a time.

    Each token is predicted from the caches and the tokens of its chunk before it, as decoding one
    token after another would predict it.
    """

    def __init__(
        self, config: TransformerConfig, byte_lengths: np.ndarray, chunk: int = _CHUNK
    ) -> None:
        """
        Args:
          config: all of whose layers have caches of constant size.
          byte_lengths: UTF-8 bytes that each token id stands for, int [vocabulary].
          chunk: tokens taken at a time.

        Raises:
          UserError: a layer's cache would grow with the text.
        """
        require_constant_memory(config)
        self.config, self._chunk = config, chunk
        self._take = jax.jit(functools.partial(_take, config, byte_lengths), donate_argnums=1)

    def empty(self) -> Cache:
        """Of one row; no text is too long for it."""
        return empty_cache(self.config, 1, 1)

    def parameters(self, parameters: Any) -> Any:
        """What `take` wants of a model's parameters."""
        return jax.jit(functools.partial(cached_parameters, self.config))(parameters)

    def take(
        self, parameters: Any, cache: Cache, book: Book, first: int
    ) -> tuple[Sums, Cache, int]:
        """Takes a chunk of a text in; also gives where the next begins. The given cache is used up.

        Nothing is predicted from a text's last token, which only a text after it may see.
        """
        last = min(first + self._chunk, len(book.tokens))
        tokens, targets = (
            np.pad(x, (0, self._chunk - len(x)), constant_values=fill)[None].astype(np.int32)
            for x, fill in (
                (book.tokens[first:last], 0),
                (book.tokens[first + 1 : last + 1].astype(np.int64), -1),
            )
        )
        sums, cache = self._take(parameters, cache, tokens, targets, jnp.int32(last - first))
        return sums, cache, last

    def compile(self, parameters: Any) -> int:
        """Once, with nothing taken in; gives the bytes of the device that a chunk needs."""
        nothing = np.zeros((1, self._chunk), np.int32)
        return _first_call(self._take, parameters, self.empty(), nothing, nothing, jnp.int32(0))

    def fingerprint(self, parameters: Any, books: Sequence[Book], carry: bool) -> str:
        """Of what a saved stream depends on."""
        facts = (self.config, self._chunk, carry, [len(book.tokens) for book in books])
        digest = hashlib.sha256(repr(facts).encode())
        for leaf in jax.tree.leaves(jax.jit(_checksums)(parameters)):
            digest.update(int(leaf).to_bytes(4, "little"))
        for book in books:
            digest.update(book.tokens.astype("<i4").tobytes())
        return digest.hexdigest()


def stream(
    reader: Stream,
    parameters: Any,
    books: Sequence[Book],
    *,
    carry: bool = False,
    state: Path | None = None,
    save_every: int = 1000,
) -> Iterator[tuple[Book, StreamResult]]:
    """Yields each text with its result.

    Args:
      parameters: of the `Transformer`.
      carry: a text is read with the cache that the one before it left; else with an empty one.
      state: a file that the stream is kept in, and goes on from if it is there.
      save_every: chunks after which it is kept, beside the end of each text.

    Raises:
      UserError: the file cannot be read or written, or is of another stream.
      ConfigError: the positions' table is shorter than a text.
    """
    require_positions(reader.config, books, carry)
    fingerprint = "" if state is None else reader.fingerprint(parameters, books, carry)
    parameters = reader.parameters(parameters)
    device_bytes = reader.compile(parameters)
    cache, at = reader.empty(), _Place()
    if state is not None and state.exists():
        cache, words = load_cache(state, cache)
        if words.get("fingerprint") != fingerprint:
            raise UserError(
                f"{state} is of other texts, parameters or settings; remove it, or name another"
            )
        at = _Place(**json.loads(words["place"]))
    earlier = (StreamResult.of(np.asarray([x]), device_bytes) for x in at.results)
    yield from zip(books, earlier, strict=False)

    def keep() -> None:
        if state is not None:
            words = {"fingerprint": fingerprint, "place": json.dumps(dataclasses.asdict(at))}
            save_cache(state, cache, words)

    for book in books[len(at.results) :]:
        begin, waiting, chunks = time.perf_counter() - at.seconds, [], 0
        while at.first < len(book.tokens):
            found, cache, first = reader.take(parameters, cache, book, at.first)
            waiting.append(found)
            at = dataclasses.replace(at, first=first)
            chunks += 1
            if chunks % save_every == 0:
                # the device is waited for only here
                sums, waiting = _added(at.sums, waiting), []
                at = dataclasses.replace(at, sums=sums, seconds=time.perf_counter() - begin)
                keep()
                # the reading alone is timed
                begin = time.perf_counter() - at.seconds
        result = [*_added(at.sums, waiting), time.perf_counter() - begin]
        at = _Place(results=[*at.results, result])
        if not carry:
            cache = reader.empty()
        keep()
        yield book, StreamResult.of(np.asarray([result]), device_bytes)


def read_in_rows(
    config: TransformerConfig,
    parameters: Any,
    byte_lengths: np.ndarray,
    books: Sequence[Book],
    length: int,
) -> Iterator[tuple[Book, StreamResult]]:
    """The same for a model that attends everything, in rows of `length` tokens, each on its own.

    The last token of a row is the first of the next, so that every token but a text's first is
    predicted once. It is what a model can do within the length that it was trained on.
    """
    dense = dataclasses.replace(config, attention=DenseAttention(), layer_attention={})
    graph, _ = nnx.split(abstract_model(dense))
    lengths = jnp.asarray(byte_lengths, jnp.float32)

    @jax.jit
    def sums(parameters: Any, tokens: Array, targets: Array) -> Sums:
        model = nnx.merge(graph, parameters)
        losses = token_losses(model(tokens), model.head(), jnp.maximum(targets, 0))
        counted = targets >= 0
        place = jnp.arange(1, length + 1, dtype=jnp.float32)
        return Sums(
            nats=jnp.where(counted, losses, 0).sum(),
            tokens=counted.sum(dtype=jnp.float32),
            bytes=jnp.where(counted, jnp.take(lengths, targets, mode="clip"), 0).sum(),
            read=jnp.where(counted, place, 0).sum(),
            resident=jnp.where(counted, place, 0).max(),
        )

    empty = np.full((_ROWS, length), -1, np.int32)
    device_bytes = _first_call(sums, parameters, np.maximum(empty, 0), empty)
    for book in books:
        begin = time.perf_counter()
        predicted, step = len(book.tokens) - 1, _ROWS * length
        missing = max(-(-predicted // step), 1) * step - predicted
        inputs, targets = (
            np.pad(x.astype(np.int32), (0, missing), constant_values=fill).reshape(
                -1, _ROWS, length
            )
            for x, fill in ((book.tokens[:-1], 0), (book.tokens[1:], -1))
        )
        found = [sums(parameters, *part) for part in zip(inputs, targets, strict=True)]
        perplexity = Perplexity.of(np.asarray(jax.device_get(found), np.float64))
        yield book, StreamResult(perplexity, time.perf_counter() - begin, device_bytes)


def require_constant_memory(config: TransformerConfig) -> None:
    """Refuses a model with a layer whose cache grows with the text.

    Raises:
      UserError: names the first such layer.
    """
    for layer, attention in enumerate(config.attentions()):
        if kind_of(attention).grows:
            raise UserError(
                f"the cache of layer {layer} ({type(attention).__name__}) grows with the text; "
                "give every layer a window, and bounded separators: "
                "--gin.TransformerConfig.attention='@SeparatorAttention()' "
                "--gin.SeparatorAttention.separators=64 --gin.TransformerConfig.layer_attention={}"
            )


def require_positions(config: TransformerConfig, books: Sequence[Book], carry: bool) -> None:
    """Raises a ConfigError if the positions' table is shorter than a text, or than all of them."""
    config.require_positions((sum if carry else max)(len(book.tokens) for book in books))


@dataclass(frozen=True)
class _Place:
    """Where a stream is: the results of the texts before, and what is known of this one's."""

    results: list[list[float]] = dataclasses.field(default_factory=list)
    first: int = 0
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(Sums._fields))
    seconds: float = 0.0


def _added(sums: Sequence[float], found: Sequence[Sums]) -> list[float]:
    """Sums, and the larger of what is resident."""
    parts = np.asarray([sums, *jax.device_get(found)], np.float64)
    return [*parts[:, :4].sum(0), parts[:, 4].max()]


def _take(
    config: TransformerConfig,
    byte_lengths: np.ndarray,
    parameters: Any,
    cache: Cache,
    tokens: Int[Array, "1 rows"],
    targets: Int[Array, "1 rows"],
    count: Int[Array, ""],
) -> tuple[Sums, Cache]:
    """Takes the first `count` tokens in; targets below 0 are not predicted."""
    model = CachedTransformer.of(config, parameters)
    counted = (jnp.arange(tokens.shape[1]) < count) & (targets >= 0)
    read, resident = entries_of_cache(config, cache, tokens, count[None])
    hidden, cache = model.extend(tokens, cache, count[None])
    losses = token_losses(hidden, model.head(), jnp.maximum(targets, 0))
    sizes = jnp.take(jnp.asarray(byte_lengths, jnp.float32), targets, mode="clip")
    sums = Sums(
        nats=jnp.where(counted, losses, 0).sum(),
        tokens=counted.sum(dtype=jnp.float32),
        bytes=jnp.where(counted, sizes, 0).sum(),
        read=jnp.where(counted, read, 0).sum(),
        resident=resident.max().astype(jnp.float32),
    )
    return sums, cache


def _first_call(program: Any, *arguments: Any) -> int:
    """Compiles and calls a jitted function; gives the bytes that it needs of the device."""
    memory = program.lower(*arguments).compile().memory_analysis()
    jax.block_until_ready(program(*arguments))
    if memory is None:  # the backend does not tell
        return 0
    given_back = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + given_back + memory.temp_size_in_bytes


def _checksums(parameters: Any) -> Any:
    """A number of each parameter's bits and their places, the same on every device."""

    def checksum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).ravel()
        return (bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, parameters)
