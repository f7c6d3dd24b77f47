"""The cache of SepLLM's published streaming code, for parity with the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqeff.models.attend import attend, attend_blocks
from seqeff.models.caches.entries import KeysValues, aligned, pick, put
from seqeff.models.caches.protocol import Sizes
from seqeff.models.heads import Heads
from seqeff_kernels.decode_attention import CacheBlock
from seqeff_kernels.range_attention import Backend, PackedIndices, RangeSource, pack


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
    """What new tokens attend of the list of a row's entries and them, and which of it stay.

    Attributes:
      first: index in the row of the new tokens' first.
      past_start: where the past window of each row begins.
      separators: packed.
      rank: how many of the separators are before the past window.
      moves: of the list, what each slot holds after the step.
      evicts: whether any of the tokens empties the past window.
    """

    first: Int[Array, " batch"]
    count: Int[Array, " batch"]
    filled: Int[Array, " batch"]
    past_start: Int[Array, "batch rows"]
    separators: PackedIndices
    rank: Int[Array, "batch rows"]
    moves: Int[Array, "batch slots"]
    evicts: Bool[Array, " batch"]


@dataclass(frozen=True)
class PublishedCache:
    """Four blocks: initial tokens, separators, a past window that fills up, and a local one.

    Past `entries_limit` in all, the past window is emptied: its separators join theirs, of which
    the newest `separators` stay, and its other tokens are gone. So the number of entries is a
    saw-tooth, (initial + separators + local + entries_limit) / 2 in the mean where separators
    abound. A token attends all entries, itself included, before any are gone.

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

    @property
    def grows(self) -> bool:
        return False

    def empty(self, sizes: Sizes) -> tuple[PublishedState, KeysValues]:
        slots = aligned(self.entries_limit + 1)
        length, filled = (jnp.zeros(sizes.batch, jnp.int32) for _ in range(2))
        state = PublishedState(length, filled, jnp.zeros((sizes.batch, slots), bool))
        return state, KeysValues.empty(sizes, slots)

    def begin(
        self, state: PublishedState, tokens: Int[Array, "batch rows"], count: Int[Array, " batch"]
    ) -> tuple[PublishedStep, PublishedState]:
        rows, slots = tokens.shape[1], state.separates.shape[1]
        row, entry = jnp.arange(rows), jnp.arange(slots + rows)
        counts, filled = count[:, None], state.filled[:, None]
        # the list: of the entries and, right after them, the new tokens
        place, end = filled + row, filled + counts
        found = self.chooser.are_separators(tokens, state.length[:, None] + row)
        separates = jnp.pad(state.separates, ((0, 0), (0, rows)))
        separates = put(separates, place, found, row < counts)
        separates &= (entry >= self.initial) & (entry < end)
        separators = pack(separates)
        before = separators.count - separates
        past_start, last_start = self._past_windows(before, place, end)
        last_rank = pick(before, last_start)
        newest = separates & (before >= last_rank - self.separators) & (entry < last_start)
        stays = (entry < self.initial) | newest | ((entry >= last_start) & (entry < end))
        moves = pack(stays, slots).indices
        staying = jnp.minimum(last_rank, self.separators) + end - last_start + self.initial
        step = PublishedStep(
            state.length,
            count,
            state.filled,
            past_start,
            separators,
            rank=pick(before, past_start),
            moves=moves,
            evicts=last_start[:, 0] > self.initial,
        )
        return step, PublishedState(state.length + count, staying[:, 0], pick(separates, moves))

    def _past_windows(
        self,
        before: Int[Array, "batch list"],
        place: Int[Array, "batch rows"],
        end: Int[Array, "batch 1"],
    ) -> tuple[Int[Array, "batch rows"], Int[Array, "batch 1"]]:
        """Where in the list the past window begins, for each new token and after all of them.

        The token that is one entry too many attends them all; then the past window is emptied, and
        the next one begins where the local window does. The entries before the past window that
        are still there are the initial tokens and the newest separators.

        Args:
          before: how many separators are before each entry of the list.
          place: of each new token in the list.
          end: of the list.
        """

        def evict(_: Any, windows: tuple[Array, Array]) -> tuple[Array, Array]:
            """The next eviction of each row of the batch, if there is one."""
            seen, current = windows
            kept = jnp.minimum(pick(before, current), self.separators)
            one_too_many = self.entries_limit - self.initial - kept + current
            evicts = one_too_many < end
            current = jnp.where(evicts, one_too_many + 1 - self.local, current)
            return jnp.where(evicts & (place > one_too_many), current, seen), current

        # separators that earlier evictions left count as of the past window until the next one
        current = jnp.full_like(end, self.initial)
        # tokens from one eviction to the next, at least
        between = self.entries_limit + 1 - self.initial - self.separators - self.local
        evictions = 1 + (place.shape[1] - 1) // between
        windows = (jnp.broadcast_to(current, place.shape), current)
        return jax.lax.fori_loop(0, evictions, evict, windows)

    def attend(
        self, step: PublishedStep, arrays: KeysValues, heads: Heads, backend: Backend
    ) -> tuple[Float[Array, "batch rows heads head_dim"], KeysValues]:
        rows = heads.rows
        row = jnp.arange(rows)
        place, index = step.filled[:, None] + row, step.first[:, None] + row

        def turned(x: Array, by: Array) -> Array:
            return heads.turned(x, by) if self.compact else x

        def own_queries(place: Array) -> Array | None:
            return heads.turned(heads.queries, place - index) if self.compact else None

        new = KeysValues(turned(heads.keys, -index), heads.values)
        if rows > 1:
            pairs = zip(arrays, new, strict=True)
            arrays = KeysValues(*(jnp.concatenate([x, y.astype(x.dtype)], 1) for x, y in pairs))
        arrays = arrays.put(place, new, row < step.count[:, None])
        queries = turned(heads.queries, place - index)
        keys = turned(arrays.keys, jnp.arange(arrays.keys.shape[1], dtype=jnp.int32)[None])
        if rows == 1:
            block = CacheBlock(keys, arrays.values, step.filled + step.count)
            return attend_blocks(queries, [block], backend), arrays
        # entries from the past window's first to the query
        near = place - step.past_start
        oldest = jnp.maximum(step.rank - self.separators, 0)
        sources = [RangeSource(keys, arrays.values, step.past_start, place + 1, finite=True)]
        if self.separators:
            ranked = turned(arrays.keys, step.separators.count - 1)
            own = own_queries(step.rank + near)
            far = (oldest, step.rank, own, step.separators)
            sources.append(RangeSource(ranked, arrays.values, *far))
        if self.initial:
            own = own_queries(self.initial + step.rank - oldest + near)
            end = jnp.minimum(place + 1, self.initial)
            first = (jnp.zeros_like(end), end, own)
            sources.append(RangeSource(keys, arrays.values, *first, finite=True))
        return attend(queries, sources, backend), arrays

    def settle(self, step: PublishedStep, arrays: Sequence[KeysValues]) -> Sequence[KeysValues]:
        """Moves the entries of rows that evict, for all layers at once."""
        slots = step.moves.shape[1]

        def move(arrays: Sequence[KeysValues]) -> Sequence[KeysValues]:
            return tuple(layer.pick(step.moves) for layer in arrays)

        def stay(arrays: Sequence[KeysValues]) -> Sequence[KeysValues]:
            return tuple(KeysValues(*(x[:, :slots] for x in layer)) for layer in arrays)

        return jax.lax.cond(step.evicts.any(), move, stay, tuple(arrays))

    def read(self, step: PublishedStep, rows: int) -> Int[Array, "batch rows"]:
        place = step.filled[:, None] + jnp.arange(rows)
        kept = jnp.minimum(step.rank, self.separators)
        return self.initial + kept + place + 1 - step.past_start

    def resident(self, state: PublishedState) -> Int[Array, " batch"]:
        return state.filled

    def overflows(self, state: PublishedState, arrays: KeysValues) -> bool:
        return False
