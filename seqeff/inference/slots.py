"""The rows that are decoded together, on the device; requests take these slots in turn."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqeff.inference.sampling import Settings, Way, draw
from seqeff.models import (
    Cache,
    CachedTransformer,
    TransformerConfig,
    emptied_rows,
    empty_cache,
)
from seqeff.models.caches import replace_rows, select_rows, where_rows
from seqeff.models.flops import entries_of_cache


class Slots(NamedTuple):
    """What the device knows of every slot.

    Attributes:
      token: the last one drawn, which the cache has not taken in.
      left: how many further tokens are to be drawn; 0 while a prompt is being read.
      drawn: how many were.
      seen: tokens of the prompt and, where every call so far was "filtered", those drawn.
    """

    cache: Cache
    token: Int[Array, " slots"]
    left: Int[Array, " slots"]
    drawn: Int[Array, " slots"]
    settings: Settings
    seen: Bool[Array, "slots vocabulary"]


class Chunk(NamedTuple):
    """Tokens of prompts.

    Attributes:
      tokens: padded at the end.
      count: how many of each row's tokens are real; 0 leaves its slot as it is.
      begins: whether they are the first of a request, whose settings are given.
      wanted: how many are to be drawn, where the prompt ends with this chunk; else 0.
    """

    tokens: Int[Array, "rows chunk"]
    count: Int[Array, " rows"]
    begins: Bool[Array, " rows"]
    wanted: Int[Array, " rows"]
    settings: Settings


class Drawn(NamedTuple):
    """What a call gives for every slot, and for each of its steps, if it has several.

    Attributes:
      token: the one drawn.
      is_real: whether one was to be drawn.
      log_probability: of the token, under the model itself.
      read: entries that the tokens taken in read, in the mean over the layers.
      resident: most entries that a layer holds.
    """

    token: Int[Array, "*steps slots"]
    is_real: Bool[Array, "*steps slots"]
    log_probability: Float[Array, "*steps slots"]
    read: Float[Array, "*steps slots"]
    resident: Int[Array, "*steps slots"]


def empty_slots(
    config: TransformerConfig, vocabulary_size: int, count: int, context: int, kept: int | None
) -> Slots:
    """Slots without requests; see `empty_cache`."""
    token, left, drawn = (jnp.zeros(count, jnp.int32) for _ in range(3))
    settings = Settings(*(jnp.zeros(count, x.dtype) for x in Settings.of(())))
    seen = jnp.zeros((count, vocabulary_size), bool)
    cache = empty_cache(config, count, context, kept)
    return Slots(cache, token, left, drawn, settings, seen)


def read_prompts(
    config: TransformerConfig,
    ends: tuple[int, ...],
    parameters: Any,
    slots: Slots,
    rows: Int[Array, " rows"] | None,
    chunk: Chunk,
    way: Way,
    start: Slots | None = None,
) -> tuple[Slots, Drawn]:
    """Takes chunks of prompts in, and draws the first token after those that end.

    Args:
      ends: tokens after which nothing is drawn.
      parameters: of the `CachedTransformer`.
      rows: slots of the chunks' rows; None: all, in order.
      way: that suits all of the chunks' settings.
      start: one slot, which has read what comes before every prompt; None: nothing does.
    """
    taken = slots if rows is None else select_rows(slots, rows)
    begins = chunk.begins
    if start is None:
        taken = taken._replace(
            cache=emptied_rows(taken.cache, begins), seen=taken.seen & ~begins[:, None]
        )
    else:
        taken = where_rows(begins, start, taken)
    settings = where_rows(begins, chunk.settings, taken.settings)
    drawn = jnp.where(begins, 0, taken.drawn)
    left = jnp.where(chunk.count > 0, chunk.wanted, taken.left)
    real = jnp.arange(chunk.tokens.shape[1]) < chunk.count[:, None]
    seen = _marked(taken.seen, chunk.tokens, real)
    taken = Slots(taken.cache, taken.token, left, drawn, settings, seen)
    is_real = chunk.wanted > 0
    taken, found = _step(config, ends, parameters, taken, chunk.tokens, chunk.count, is_real, way)
    return taken if rows is None else replace_rows(slots, rows, taken), found


def decode(
    config: TransformerConfig,
    ends: tuple[int, ...],
    steps: int,
    parameters: Any,
    slots: Slots,
    way: Way,
) -> tuple[Slots, Drawn]:
    """Draws so many further tokens of every slot, or fewer where fewer are to be drawn."""

    def step(slots: Slots, _: None) -> tuple[Slots, Drawn]:
        is_real = slots.left > 0
        count = is_real.astype(jnp.int32)
        return _step(config, ends, parameters, slots, slots.token[:, None], count, is_real, way)

    return jax.lax.scan(step, slots, length=steps)


def _step(
    config: TransformerConfig,
    ends: tuple[int, ...],
    parameters: Any,
    slots: Slots,
    tokens: Int[Array, "slots rows"],
    count: Int[Array, " slots"],
    is_real: Bool[Array, " slots"],
    way: Way,
) -> tuple[Slots, Drawn]:
    """Takes tokens in, and draws the next where it `is_real`."""
    model = CachedTransformer.of(config, parameters)
    read, resident = entries_of_cache(config, slots.cache, tokens, count)
    read = jnp.where(jnp.arange(tokens.shape[1]) < count[:, None], read, 0).sum(1)
    hidden, cache = model.extend(tokens, slots.cache, count)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)
    logits = model.logits(hidden)[:, 0, : slots.seen.shape[1]]
    token, log_probability = draw(logits, slots.settings, slots.drawn, slots.seen, way)
    token = jnp.where(is_real, token, slots.token)
    left = jnp.where(is_real, slots.left - 1, slots.left)
    at_end = (token[:, None] == jnp.asarray(ends, jnp.int32)).any(1)
    left = jnp.where(is_real & at_end, 0, left)
    seen = slots.seen
    if way == "filtered":
        seen = _marked(seen, token[:, None], is_real[:, None])
    after = Slots(cache, token, left, slots.drawn + is_real, slots.settings, seen)
    resident = jnp.where(count > 0, resident, 0)
    return after, Drawn(token, is_real, log_probability, read, resident)


def _marked(
    seen: Bool[Array, "rows vocabulary"], tokens: Int[Array, "rows n"], real: Bool[Array, "rows n"]
) -> Bool[Array, "rows vocabulary"]:
    row = jnp.arange(seen.shape[0])[:, None]
    return seen.at[row, jnp.where(real, tokens, seen.shape[1])].set(True, mode="drop")
