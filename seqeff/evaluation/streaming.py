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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqeff.checks import UserError
from seqeff.data import ByteLengths
from seqeff.evaluation.books import Book, StreamResult, added, first_call
from seqeff.evaluation.perplexity import sums_by_part
from seqeff.models import (
    Cache,
    CachedTransformer,
    TransformerConfig,
    cached_parameters,
    empty_cache,
    token_losses,
)
from seqeff.models.caches import kind_of
from seqeff.models.caches.files import load_cache, save_cache
from seqeff.models.flops import entries_of_cache

_CHUNK = 512


class Stream:
    """Reads texts through a model's caches, a chunk at a time.

    Each token is predicted from the caches and the tokens of its chunk before it, as decoding one
    token after another would predict it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        byte_lengths: ByteLengths,
        chunk: int = _CHUNK,
        parts: int = 1,
    ) -> None:
        """
        Args:
          config: all of whose layers have caches of constant size.
          chunk: tokens taken at a time.
          parts: equal ones of each text, which are told apart.

        Raises:
          UserError: a layer's cache would grow with the text.
        """
        require_constant_memory(config)
        self.config, self.parts, self._chunk = config, parts, chunk
        self._take = jax.jit(
            functools.partial(_take, config, byte_lengths, parts), donate_argnums=1
        )

    def empty(self) -> Cache:
        """Of one row; no text is too long for it."""
        return empty_cache(self.config, 1, 1)

    def parameters(self, parameters: Any) -> Any:
        """What `take` wants of a model's parameters."""
        return jax.jit(functools.partial(cached_parameters, self.config))(parameters)

    def take(
        self, parameters: Any, cache: Cache, book: Book, first: int
    ) -> tuple[Float[Array, "parts 5"], Cache, int]:
        """Takes a chunk of a text in; gives its sums, the cache, and where the next chunk begins.

        Nothing is predicted from a text's last token, which only a text after it may see. The given
        cache is used up.
        """
        last = min(first + self._chunk, len(book.tokens))
        tokens, targets, part = (
            np.pad(x, (0, self._chunk - len(x)), constant_values=fill)[None]
            for x, fill in (
                (book.tokens[first:last], 0),
                (book.tokens[first + 1 : last + 1], 0),
                (book.parts(self.parts, first, last), -1),
            )
        )
        count = jnp.int32(last - first)
        sums, cache = self._take(parameters, cache, tokens, targets, part, count)
        return sums, cache, last

    def compile(self, parameters: Any) -> int:
        """Once, with nothing taken in; gives the bytes of the device that a chunk needs."""
        nothing = np.zeros((1, self._chunk), np.int32)
        texts = (nothing, nothing, nothing - 1)
        return first_call(self._take, parameters, self.empty(), *texts, jnp.int32(0))

    def fingerprint(self, parameters: Any, books: Sequence[Book], carry: bool) -> str:
        """Of what a saved stream depends on."""
        facts = (self.config, self._chunk, self.parts, carry, [len(book.tokens) for book in books])
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
    nothing = np.zeros((reader.parts, 5))
    cache, at = reader.empty(), _Place([], 0, nothing.tolist(), 0.0)
    if state is not None and state.exists():
        cache, words = load_cache(state, cache)
        if words.get("fingerprint") != fingerprint:
            raise UserError(
                f"{state} is of other texts, parameters or settings; remove it, or name another"
            )
        at = _Place(**json.loads(words["place"]))
    earlier = (StreamResult.of(*result, device_bytes) for result in at.results)
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
                sums, waiting = added([at.sums, *waiting]).tolist(), []
                at = dataclasses.replace(at, sums=sums, seconds=time.perf_counter() - begin)
                keep()
                # the reading alone is timed
                begin = time.perf_counter() - at.seconds
        result = added([at.sums, *waiting]).tolist(), time.perf_counter() - begin
        at = _Place([*at.results, result], 0, nothing.tolist(), 0.0)
        if not carry:
            cache = reader.empty()
        keep()
        yield book, StreamResult.of(*result, device_bytes)


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

    results: list[tuple[list[list[float]], float]]
    first: int
    sums: list[list[float]]
    seconds: float


def _take(
    config: TransformerConfig,
    byte_lengths: ByteLengths,
    parts: int,
    parameters: Any,
    cache: Cache,
    tokens: Int[Array, "1 rows"],
    targets: Int[Array, "1 rows"],
    part: Int[Array, "1 rows"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "parts 5"], Cache]:
    """Takes the first `count` tokens in; `part`: see `sums_by_part`."""
    model = CachedTransformer.of(config, parameters)
    read, resident = entries_of_cache(config, cache, tokens, count[None])
    hidden, cache = model.extend(tokens, cache, count[None])
    losses = token_losses(hidden, model.head(), targets)
    sizes = byte_lengths.of(targets, tokens)
    return sums_by_part(part, parts, losses, sizes, read, resident[:, None]), cache


def _checksums(parameters: Any) -> Any:
    """A number of each parameter's bits and their places, the same on every device."""

    def checksum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).ravel()
        return (bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, parameters)
