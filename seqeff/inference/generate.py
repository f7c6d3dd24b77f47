"""Sampling one continuation, token by token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqeff.checks import UserError, check_types, require
from seqeff.data import Tokenizer, TokenStream
from seqeff.models import (
    Cache,
    CachedTransformer,
    TransformerConfig,
    cached_parameters,
    empty_cache,
    most_kept,
)
from seqeff.models.caches import kind_of
from seqeff.models.flops import entries_of_cache

# tokens of a prompt that are taken at a time, and a multiple that the last ones are filled up to
_CHUNK = 512
_ROUNDING = 64
_LEAST_KEPT = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0, else among the `top_k` likeliest."""

    temperature: float = 0.8
    top_k: int | None = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.temperature >= 0, f"Sampling.temperature = {self.temperature} must not be negative"
        )
        require(
            self.top_k is None or self.top_k >= 1,
            f"Sampling.top_k = {self.top_k} must be at least 1, or null for all",
        )
        require(
            0 <= self.seed < 2**32, f"Sampling.seed = {self.seed} must be at least 0, below 2**32"
        )


@dataclasses.dataclass
class CacheUse:
    """Of the caches, by the prompt's tokens and those drawn that were taken in.

    Attributes:
      tokens: that many.
      read: entries that they attended in a layer, themselves included, in the mean over the layers.
      resident: most entries that a layer held after one of them.
    """

    tokens: int = 0
    read: float = 0.0
    resident: int = 0

    def add(self, tokens: int, read: float, resident: int) -> None:
        """Counts further tokens."""
        self.tokens, self.read = self.tokens + tokens, self.read + read
        self.resident = max(self.resident, resident)


class Generator:
    """Generates from a model with caches of a fixed size; its steps compile once a length.

    A prompt goes into the caches in chunks. Where they are of constant size, so is the memory that
    a prompt of any length takes.

    Attributes:
      use: of the caches, by the latest stream.
    """

    def __init__(
        self, config: TransformerConfig, vocabulary_size: int, context: int | None
    ) -> None:
        """
        Args:
          config: of the model, knowing its vocabulary.
          vocabulary_size: the tokenizer's; ids past it are never drawn.
          context: tokens that prompt and continuation may have together; None: any number, for
            models whose caches do not grow.
        """
        self.context, self.use = context, CacheUse()
        self._extend = jax.jit(
            functools.partial(_extend, config, vocabulary_size),
            static_argnames=("sampling",),
            donate_argnames=("cache",),
        )
        self._parameters = jax.jit(functools.partial(cached_parameters, config))
        self._config = config
        self._empty = jax.jit(
            functools.partial(empty_cache, config, 1, context or 1), static_argnames=("kept",)
        )

    def stream(
        self, parameters: Any, prompt: Sequence[int], tokens: int, sampling: Sampling, stop: int
    ) -> Iterator[int]:
        """Yields up to `tokens` ids that continue the prompt, ending before the id `stop`.

        Args:
          parameters: of the `Transformer`.

        Raises:
          UserError: see `check_prompt`.
        """
        check_prompt(prompt, self.context)
        key = jax.random.key(sampling.seed)
        # a seed is no reason to compile again
        extend = functools.partial(
            self._extend,
            self._parameters(parameters),
            key=key,
            sampling=dataclasses.replace(sampling, seed=0),
        )
        count = tokens if self.context is None else min(tokens, self.context - len(prompt))
        kept = most_kept(self._config, jnp.asarray([prompt], jnp.int32), count)
        # few sizes, for each of which the steps compile
        kept = max(_LEAST_KEPT, 1 << (kept - 1).bit_length())
        cache = self._empty(kept=kept)
        self.use = use = CacheUse()
        parts, waiting = [prompt[i : i + _CHUNK] for i in range(0, len(prompt), _CHUNK)], []
        for part in parts:
            # rounding up keeps the number of compiled lengths small
            ids = np.pad(part, (0, -len(part) % _ROUNDING))
            drawn, cache = extend(ids[None].astype(np.int32), len(part), cache)
            waiting.append(drawn)
        # the device is waited for only here
        drawn = jax.device_get(waiting)
        for part, found in zip(parts, drawn, strict=True):
            use.add(len(part), float(found.read), int(found.resident))
        token = int(drawn[-1].token)
        for index in range(count):
            if token == stop:
                return
            yield token
            if index + 1 < count:
                drawn, cache = extend(np.asarray([[token]], np.int32), 1, cache)
                found = jax.device_get(drawn)
                use.add(1, float(found.read), int(found.resident))
                token = int(found.token)


def generation_context(config: TransformerConfig, length: int) -> int | None:
    """Tokens that prompt and continuation may have: `length`, or None where memory is constant."""
    grows = any(kind_of(attention).grows for attention in config.attentions())
    return length if grows or config.positions.limit is not None else None


def check_prompt(prompt: Sequence[int], context: int | None) -> None:
    """Raises a UserError if a prompt is empty, or leaves no room in the context."""
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    if context is not None and len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens; the context of {context} leaves room for "
            f"{context - 1} before the first new one; --context gives more, and bounded separators "
            "in every layer take any number (--gin.SeparatorAttention.separators)"
        )


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of ids as they come, whole characters only."""
    stream = TokenStream(tokenizer)
    for token in ids:
        yield stream.push(token)
    yield stream.finish()


class _Drawn(NamedTuple):
    """The next token, entries that the tokens before it read, and the most that a layer holds."""

    token: jax.Array
    read: jax.Array
    resident: jax.Array


def _extend(
    config: TransformerConfig,
    vocabulary_size: int,
    parameters: Any,
    tokens: jax.Array,
    count: jax.Array | int,
    cache: Cache,
    key: jax.Array,
    sampling: Sampling,
) -> tuple[_Drawn, Cache]:
    """Takes the first `count` tokens into the cache and draws the next one."""
    model = CachedTransformer.of(config, parameters)
    drawn_before = cache.length[0]
    counts = jnp.full(tokens.shape[:1], count, jnp.int32)
    read, resident = entries_of_cache(config, cache, tokens, counts)
    hidden, cache = model.extend(tokens, cache, counts)
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    logits = model.logits(last)[:, 0, :vocabulary_size]
    token = _draw(logits, jax.random.fold_in(key, drawn_before), sampling)
    read = jnp.where(jnp.arange(tokens.shape[1]) < count, read, 0).sum()
    return _Drawn(token[0], read, resident[0]), cache


def _draw(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        floor = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.random.categorical(key, logits / sampling.temperature, axis=-1)
