"""The cache of SepLLM's published streaming code, for parity with the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqeff.models.attend import attend_blocks
from seqeff.models.caches.protocol import Sizes, aligned, put
from seqeff.models.caches.whole import KeysValues
from seqeff.models.heads import Heads
from seqeff_kernels.decode_attention import CacheBlock
from seqeff_kernels.range_attention import Backend, pack


class PublishedState(NamedTuple):
    """Of the entries `[initial | separators | past window | local]` of each row.

    Attributes:
      length: tokens so far.
      filled: entries.
      separates: which entries are separators.
    """

    length: Int[Array, " batch"]
    filled: Int[Array, " batch"]
    separates: Bool[Array, "batch slots"]


class PublishedStep(NamedTuple):
    """A token's slot, and how the entries are moved once it has attended them."""

    length: Int[Array, " batch"]
    real: Bool[Array, " batch"]
    slot: Int[Array, " batch"]
    moves: Int[Array, "batch slots"]
    evicts: Bool[Array, " batch"]


@dataclass(frozen=True)
class PublishedCache:
    """Four blocks: initial tokens, separators, a past window that fills up, and a local one.

    Past `entries_limit` in all, the past window is emptied: its separators join theirs, of which
    the newest `separators` stay, and its other tokens are gone. So the number of entries is a
    saw-tooth, (initial + separators + local + entries_limit) / 2 in the mean where separators
    abound. One token is taken at a time, and it attends all entries, itself included.

    With `compact`, keys and queries are rotated by their index in the cache (keys are kept as if
    at position 0).

    Source: SepLLM (arXiv 2412.12094), section 3.3 and its Streaming-SepLLM code; rows there evict
    together, here each on its own.
    """

    local: int
    initial: int
    separators: int
    entries_limit: int
    chooser: Any
    compact: bool = True
    most_rows: int | None = 1
    grows: bool = False

    def empty(self, sizes: Sizes) -> tuple[PublishedState, KeysValues]:
        slots = aligned(self.entries_limit + 1)
        length, filled = (jnp.zeros(sizes.batch, jnp.int32) for _ in range(2))
        state = PublishedState(length, filled, jnp.zeros((sizes.batch, slots), bool))
        return state, KeysValues.empty(sizes, slots)

    def begin(
        self, state: PublishedState, tokens: Int[Array, "batch 1"], count: Int[Array, " batch"]
    ) -> tuple[PublishedStep, PublishedState]:
        real = count > 0
        length = state.length[:, None]
        separates = put(
            state.separates,
            state.filled[:, None],
            self.chooser.are_separators(tokens, length),
            real[:, None],
        )
        filled = state.filled + real
        entry = jnp.arange(separates.shape[1])
        past_end = (filled - self.local)[:, None]
        # all that their block holds, and those of the past window
        kept = separates & (entry >= self.initial) & (entry < past_end)
        newest = jnp.cumsum(kept[:, ::-1], axis=1)[:, ::-1] <= self.separators
        kept &= newest
        local = (entry >= past_end) & (entry < filled[:, None])
        moves = pack((entry < self.initial) | kept | local).indices
        evicts = filled > self.entries_limit
        left = self.initial + kept.sum(1, dtype=jnp.int32) + self.local
        after = PublishedState(
            length=state.length + real,
            filled=jnp.where(evicts, left, filled),
            separates=jnp.where(
                evicts[:, None], jnp.take_along_axis(separates, moves, axis=1), separates
            ),
        )
        return PublishedStep(state.length, real, state.filled, moves, evicts), after

    def attend(
        self, step: PublishedStep, arrays: KeysValues, heads: Heads, backend: Backend
    ) -> tuple[Float[Array, "batch 1 heads head_dim"], KeysValues]:
        keys, queries, length = heads.keys, heads.queries, step.length[:, None]
        if self.compact:
            keys = heads.turned(keys, -length)
            queries = heads.turned(queries, step.slot[:, None] - length)
        new = KeysValues(keys, heads.values)
        arrays = arrays.put(step.slot[:, None], new, step.real[:, None])
        keys = arrays.keys
        if self.compact:
            entry = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
            keys = heads.turned(keys, entry)
        block = CacheBlock(keys, arrays.values, step.slot + step.real)
        return attend_blocks(queries, [block], backend), arrays

    def settle(self, step: PublishedStep, arrays: Sequence[KeysValues]) -> Sequence[KeysValues]:
        """Moves the entries of rows that evict, for all layers at once."""

        def move(arrays: Sequence[KeysValues]) -> Sequence[KeysValues]:
            slot = jnp.arange(step.moves.shape[1])
            moves = jnp.where(step.evicts[:, None], step.moves, slot)
            return tuple(layer.pick(moves) for layer in arrays)

        return jax.lax.cond(step.evicts.any(), move, lambda arrays: arrays, tuple(arrays))

    def read(self, step: PublishedStep, rows: int) -> Int[Array, "batch 1"]:
        del rows
        return step.slot[:, None] + 1

    def resident(self, state: PublishedState) -> Int[Array, " batch"]:
        return state.filled
