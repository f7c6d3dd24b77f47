"""A cache of constant size: initial tokens, a ring of kept ones, and a ring of the nearest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqeff.models.attend import attend, attend_blocks
from seqeff.models.caches.entries import KeysValues, aligned, pick
from seqeff.models.caches.protocol import Sizes
from seqeff.models.heads import Heads
from seqeff_kernels.decode_attention import CacheBlock
from seqeff_kernels.range_attention import (
    Backend,
    PackedIndices,
    RangeSource,
    Source,
    TokenSource,
    pack,
)


class BlocksState(NamedTuple):
    """Where each row is.

    Attributes:
      length: tokens so far.
      kept: kept tokens that have left the window, so far.
      keeps: whether the token in each slot of the window is to be kept; token t has slot t mod n.
    """

    length: Int[Array, " batch"]
    kept: Int[Array, " batch"]
    keeps: Bool[Array, "batch window"]


class Blocks(NamedTuple):
    """A layer's entries: initial token k in slot k, kept token k in slot k mod s, rings both."""

    initial: KeysValues
    kept: KeysValues
    window: KeysValues


class OneToken(NamedTuple):
    """A step of one token: what it moves where, and what it attends."""

    token: Int[Array, " batch"]
    real: Bool[Array, " batch"]
    leaves: Bool[Array, " batch"]
    rank: Int[Array, " batch"]
    initial_filled: Int[Array, " batch"]
    kept_filled: Int[Array, " batch"]
    window_filled: Int[Array, " batch"]


class ManyTokens(NamedTuple):
    """A step of several tokens, which attend lists in order.

    The nearest are the tokens of the window, from the oldest on, and then the new ones.

    Attributes:
      first: index in the row of the new tokens' first.
      nearest_slot: slots of the window that its tokens are read from.
      nearest_start: the first of the nearest that exists.
      last: which of the nearest each slot of the window holds after the step.
      initial_end: initial entries that each row attends.
      far: of the kept tokens; None where none are kept.
    """

    first: Int[Array, " batch"]
    count: Int[Array, " batch"]
    nearest_slot: Int[Array, "batch window"]
    nearest_start: Int[Array, " batch"]
    last: Int[Array, "batch window"]
    initial_end: Int[Array, "batch rows"]
    far: Far | None


class Far(NamedTuple):
    """The kept tokens of a step of several.

    Attributes:
      rank: of the nearest that are kept: how many were kept before them.
      start, end: range of the list that each row attends; `rank_end` is the rank after it.
      leaves: which of the nearest leave the window in this step, and join the kept ones.
      turnover: of a ring that overwrites its oldest; None where none is, and the ring is the list.
    """

    rank: Int[Array, "batch nearest"]
    start: Int[Array, "batch rows"]
    end: Int[Array, "batch rows"]
    rank_end: Int[Array, "batch rows"]
    leaves: Bool[Array, "batch nearest"]
    turnover: Turnover | None = None


class Turnover(NamedTuple):
    """How a ring that overwrites its oldest goes on to the kept tokens of a step.

    Attributes:
      slot: its slots, oldest first, which the nearest follow.
      packed: those of slots and nearest that hold a kept token, which are the list.
      source: which of slots and nearest each slot of the ring holds after the step.
    """

    slot: Int[Array, "batch slots"]
    packed: PackedIndices
    source: Int[Array, "batch slots"]


@dataclass(frozen=True)
class BlockCache:
    """The first `initial` tokens, the last `ring` of those chosen, and the last `window`.

    A token that leaves the window joins the ring of the kept ones, or is gone. Decoding with it
    gives what the attention gives over whole rows.

    Attributes:
      ring: slots for kept tokens; None: as many as `Sizes.kept`, so that none is overwritten.
      chooser: says by `are_separators(tokens, positions)` which tokens are kept.
      compact: kept and initial tokens take the positions right before the window.
    """

    window: int
    initial: int = 0
    ring: int | None = 0
    chooser: Any = None
    compact: bool = False

    @property
    def grows(self) -> bool:
        return self.ring is None

    def empty(self, sizes: Sizes) -> tuple[BlocksState, Blocks]:
        # arrays of their own, which can be donated
        length, kept = (jnp.zeros(sizes.batch, jnp.int32) for _ in range(2))
        state = BlocksState(length, kept, jnp.zeros((sizes.batch, self.window), bool))
        ring = sizes.kept if self.ring is None else max(self.ring, 1)
        slots = (aligned(self.initial), ring, self.window)
        return state, Blocks(*(KeysValues.empty(sizes, count) for count in slots))

    def begin(
        self, state: BlocksState, tokens: Int[Array, "batch rows"], count: Int[Array, " batch"]
    ) -> tuple[OneToken | ManyTokens, BlocksState]:
        if tokens.shape[1] == 1:
            return self._begin_one(state, tokens, count)
        return self._begin_many(state, tokens, count)

    def attend(
        self, step: OneToken | ManyTokens, arrays: Blocks, heads: Heads, backend: Backend
    ) -> tuple[Float[Array, "batch rows heads head_dim"], Blocks]:
        if isinstance(step, OneToken):
            return self._attend_one(step, arrays, heads, backend)
        return self._attend_many(step, arrays, heads, backend)

    def settle(self, step: OneToken | ManyTokens, arrays: Sequence[Blocks]) -> Sequence[Blocks]:
        return arrays

    def read(self, step: OneToken | ManyTokens, rows: int) -> Int[Array, "batch rows"]:
        if isinstance(step, OneToken):
            filled = step.initial_filled + step.kept_filled + step.window_filled
            return filled[:, None]
        token = step.first[:, None] + jnp.arange(rows)
        kept = 0 if step.far is None else step.far.end - step.far.start
        return step.initial_end + kept + jnp.minimum(token + 1, self.window)

    def resident(self, state: BlocksState) -> Int[Array, " batch"]:
        kept = state.kept if self.ring is None else jnp.minimum(state.kept, self.ring)
        initial = jnp.clip(state.length - self.window, 0, self.initial)
        return initial + kept + jnp.minimum(state.length, self.window)

    def overflows(self, state: BlocksState, arrays: Blocks) -> Bool[Array, " batch"] | bool:
        # a ring that is to overwrite its oldest never does
        return self.ring is None and state.kept > arrays.kept.keys.shape[1]

    def _joins(self, tokens: Array, index: Array) -> Array:
        """Which tokens join the ring when they leave the window; `index` is theirs in the row."""
        if self.ring == 0:
            return jnp.zeros(tokens.shape, bool)
        return self.chooser.are_separators(tokens, index) & (index >= self.initial)

    def _begin_one(
        self, state: BlocksState, tokens: Array, count: Array
    ) -> tuple[OneToken, BlocksState]:
        length, real = state.length, count > 0
        slot = (length % self.window)[:, None]
        # the slot of the new token holds the one that leaves
        leaves = real & (length >= self.window) & pick(state.keeps, slot)[:, 0]
        kept = state.kept + leaves
        now = length + real
        step = OneToken(
            token=length,
            real=real,
            leaves=leaves,
            rank=state.kept,
            initial_filled=jnp.clip(now - self.window, 0, self.initial),
            kept_filled=kept if self.ring is None else jnp.minimum(kept, self.ring),
            window_filled=jnp.minimum(now, self.window),
        )
        keeps = self._joins(tokens, length[:, None])
        keeps = jnp.where((jnp.arange(self.window) == slot) & real[:, None], keeps, state.keeps)
        return step, BlocksState(now, kept, keeps)

    def _attend_one(
        self, step: OneToken, arrays: Blocks, heads: Heads, backend: Backend
    ) -> tuple[Array, Blocks]:
        new = KeysValues(heads.keys, heads.values)
        slot = (step.token % self.window)[:, None]
        initial, kept, window = arrays
        # entries between the last of a block and the query
        between = step.window_filled - 1
        blocks = []
        if self.ring != 0:
            moved, queries = window.pick(slot), None
            if self.compact:
                by = (step.rank - (step.token - self.window))[:, None]
                moved = moved._replace(keys=heads.turned(moved.keys, by))
                by = (step.rank + step.leaves + between - step.token)[:, None]
                queries = heads.turned(heads.queries, by)
                between += step.kept_filled
            ring = (step.rank % kept.keys.shape[1])[:, None]
            kept = kept.put(ring, moved, step.leaves[:, None])
            blocks.append(CacheBlock(*kept, step.kept_filled, queries))
        if self.initial:
            is_initial = step.real & (step.token < self.initial)
            initial, queries = initial.put(step.token[:, None], new, is_initial[:, None]), None
            if self.compact:
                by = (step.initial_filled + between - step.token)[:, None]
                queries = heads.turned(heads.queries, by)
            blocks.append(CacheBlock(*initial, step.initial_filled, queries))
        window = window.put(slot, new, step.real[:, None])
        blocks.append(CacheBlock(*window, step.window_filled))
        return attend_blocks(heads.queries, blocks, backend), Blocks(initial, kept, window)

    def _begin_many(
        self, state: BlocksState, tokens: Array, count: Array
    ) -> tuple[ManyTokens, BlocksState]:
        rows, window = tokens.shape[1], self.window
        length, counts = state.length[:, None], count[:, None]
        index = length - window + jnp.arange(window + rows)
        nearest_slot = index[:, :window] % window
        new_index = index[:, window:]
        keeps = jnp.concatenate(
            [pick(state.keeps, nearest_slot), self._joins(tokens, new_index)], axis=1
        )
        keeps &= (index >= 0) & (index < length + counts)
        now = length + counts
        last_index = now - 1 - (now - 1 - jnp.arange(window)) % window
        last = last_index - length + window
        step = ManyTokens(
            first=state.length,
            count=count,
            nearest_slot=nearest_slot,
            nearest_start=window - jnp.minimum(state.length, window),
            last=last,
            initial_end=jnp.clip(new_index - window + 1, 0, self.initial),
            far=None if self.ring == 0 else self._far(state.kept, keeps, count, rows),
        )
        # the nearest up to i leave the window with row i
        leaving = (keeps & (jnp.arange(window + rows) < counts)).sum(1, dtype=jnp.int32)
        return step, BlocksState(now[:, 0], state.kept + leaving, pick(keeps, last))

    def _far(self, before: Array, keeps: Array, count: Array, rows: int) -> Far:
        """The kept tokens: `before` so far, and those of the nearest that are to be kept."""
        before = before[:, None]
        order = jnp.cumsum(keeps, axis=1, dtype=jnp.int32)
        rank = before + order - 1
        rank_end = before + order[:, :rows]
        leaves = keeps & (jnp.arange(keeps.shape[1]) < count[:, None])
        if self.ring is None:
            return Far(rank, jnp.zeros_like(rank_end), rank_end, rank_end, leaves)
        slots = self.ring
        ring_rank = before - slots + jnp.arange(slots)
        packed = pack(jnp.concatenate([ring_rank >= 0, keeps], axis=1))
        base = jnp.maximum(before - slots, 0)
        after = before + leaves.sum(1, dtype=jnp.int32, keepdims=True)
        final_rank = after - 1 - (after - 1 - jnp.arange(slots)) % slots
        # slots that were never filled hold anything
        source = pick(packed.indices, jnp.maximum(final_rank - base, 0))
        return Far(
            rank,
            start=jnp.maximum(rank_end - slots, 0) - base,
            end=rank_end - base,
            rank_end=rank_end,
            leaves=leaves,
            turnover=Turnover(ring_rank % slots, packed, source),
        )

    def _attend_many(
        self, step: ManyTokens, arrays: Blocks, heads: Heads, backend: Backend
    ) -> tuple[Array, Blocks]:
        window, initial, kept = self.window, arrays.initial, arrays.kept
        new = KeysValues(heads.keys, heads.values)
        nearest = KeysValues(
            *(
                jnp.concatenate([pick(old, step.nearest_slot), x.astype(old.dtype)], axis=1)
                for old, x in zip(arrays.window, new, strict=True)
            )
        )
        token = step.first[:, None] + jnp.arange(heads.rows)
        # entries between the last of a list and the query
        between = jnp.minimum(token + 1, window) - 1
        sources: list[Source] = []
        if step.far is not None:
            far = step.far
            source, kept = self._far_source(far, step.first, kept, nearest, heads)
            queries = None
            if self.compact:
                by = far.rank_end + between - token
                queries = heads.turned(heads.queries, by)
                between += far.end - far.start
            sources.append(dataclasses.replace(source, queries=queries))
        if self.initial:
            real = jnp.arange(heads.rows) < step.count[:, None]
            initial = initial.put(token, new, real & (token < self.initial))
            queries = None
            if self.compact:
                by = step.initial_end + between - token
                queries = heads.turned(heads.queries, by)
            none = jnp.zeros_like(step.initial_end)
            sources.append(RangeSource(*initial, none, step.initial_end, queries, finite=True))
        sources.append(
            TokenSource(
                *nearest,
                document_start=jnp.broadcast_to(step.nearest_start[:, None], token.shape),
                window=window,
                row_offset=window,
                finite=True,
            )
        )
        output = attend(heads.queries, sources, backend)
        return output, Blocks(initial, kept, nearest.pick(step.last))

    def _far_source(
        self, far: Far, first: Array, ring: KeysValues, nearest: KeysValues, heads: Heads
    ) -> tuple[RangeSource, KeysValues]:
        """The list of kept tokens, and the ring after the step."""
        if self.compact:
            index = first[:, None] - self.window + jnp.arange(nearest.keys.shape[1])
            turned = heads.turned(nearest.keys, far.rank - index)
            nearest = nearest._replace(keys=turned)
        if far.turnover is None:
            ring = ring.put(far.rank, nearest, far.leaves)
            return RangeSource(*ring, far.start, far.end, finite=True), ring
        listed = KeysValues(
            *(
                jnp.concatenate([old, new], axis=1)
                for old, new in zip(ring.pick(far.turnover.slot), nearest, strict=True)
            )
        )
        source = RangeSource(*listed, far.start, far.end, packed=far.turnover.packed)
        return source, listed.pick(far.turnover.source)
