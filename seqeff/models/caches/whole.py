"""Caches that keep every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqeff.models.attend import attend, attend_blocks
from seqeff.models.caches.entries import KeysValues, put
from seqeff.models.caches.protocol import Sizes
from seqeff.models.heads import Heads
from seqeff_kernels.decode_attention import CacheBlock
from seqeff_kernels.range_attention import Backend, TokenSource


class Appended(NamedTuple):
    """Where the new tokens go: right after those before."""

    plan: Any
    length: Int[Array, " batch"]
    count: Int[Array, " batch"]
    capacity: int

    def put(self, arrays: KeysValues, heads: Heads, backend: Backend) -> tuple[Array, KeysValues]:
        """The queries, and the arrays with the new tokens."""
        slot, real = _places(self.length, self.count, heads.rows)
        return arrays.append(slot, heads, real, backend)


class History(NamedTuple):
    """The tokens of every row."""

    tokens: Int[Array, "batch capacity"]
    length: Int[Array, " batch"]


@dataclass(frozen=True)
class WholeCache:
    """Every token, for any attention: it plans anew from all of them each time."""

    attention: Any

    @property
    def grows(self) -> bool:
        return True

    def empty(self, sizes: Sizes) -> tuple[History, KeysValues]:
        tokens = jnp.zeros((sizes.batch, sizes.capacity), jnp.int32)
        history = History(tokens, jnp.zeros(sizes.batch, jnp.int32))
        return history, KeysValues.empty(sizes, sizes.capacity)

    def begin(
        self, state: History, tokens: Int[Array, "batch rows"], count: Int[Array, " batch"]
    ) -> tuple[Appended, History]:
        slot, real = _places(state.length, count, tokens.shape[1])
        seen = put(state.tokens, slot, tokens, real)
        plan = self.attention.plan(seen, None)
        step = Appended(plan, state.length, count, seen.shape[1])
        return step, History(seen, state.length + count)

    def attend(
        self, step: Appended, arrays: KeysValues, heads: Heads, backend: Backend
    ) -> tuple[Float[Array, "batch rows heads head_dim"], KeysValues]:
        queries, arrays = step.put(arrays, heads, backend)
        all_heads = heads._replace(queries=queries, keys=arrays.keys, values=arrays.values)
        sources = self.attention.sources(step.plan, all_heads, step.length)
        sources = [dataclasses.replace(source, finite=True) for source in sources]
        return attend(queries, sources, backend), arrays

    def settle(self, step: Appended, arrays: Sequence[KeysValues]) -> Sequence[KeysValues]:
        return arrays

    def read(self, step: Appended, rows: int) -> Int[Array, "batch rows"]:
        capacity = step.capacity
        batch = step.length.shape[0]
        queries = jnp.zeros((batch, rows, 1, 1), jnp.float32)
        entries = jnp.zeros((batch, capacity, 1, 1), jnp.float32)
        heads = Heads(queries, entries, entries, turn=lambda x, _: x)
        total = jnp.zeros((batch, rows), jnp.int32)
        for source in self.attention.sources(step.plan, heads, step.length):
            start, end = source.bounds(rows)
            total += jnp.maximum(end - start, 0)[:, 0]
        return total

    def resident(self, state: History) -> Int[Array, " batch"]:
        return state.length

    def overflows(self, state: History, arrays: KeysValues) -> Bool[Array, " batch"]:
        return state.length > arrays.keys.shape[1]


@dataclass(frozen=True)
class TokenCache:
    """Every token, all of which the later ones attend."""

    @property
    def grows(self) -> bool:
        return True

    def empty(self, sizes: Sizes) -> tuple[Int[Array, " batch"], KeysValues]:
        return jnp.zeros(sizes.batch, jnp.int32), KeysValues.empty(sizes, sizes.capacity)

    def begin(
        self,
        state: Int[Array, " batch"],
        tokens: Int[Array, "batch rows"],
        count: Int[Array, " batch"],
    ) -> tuple[Appended, Int[Array, " batch"]]:
        return Appended(None, state, count, 0), state + count

    def attend(
        self, step: Appended, arrays: KeysValues, heads: Heads, backend: Backend
    ) -> tuple[Float[Array, "batch rows heads head_dim"], KeysValues]:
        queries, arrays = step.put(arrays, heads, backend)
        if heads.rows == 1:
            block = CacheBlock(*arrays, step.length + step.count)
            return attend_blocks(queries, [block], backend), arrays
        source = TokenSource(*arrays, row_offset=step.length, finite=True)
        return attend(queries, [source], backend), arrays

    def settle(self, step: Appended, arrays: Sequence[KeysValues]) -> Sequence[KeysValues]:
        return arrays

    def read(self, step: Appended, rows: int) -> Int[Array, "batch rows"]:
        return step.length[:, None] + 1 + jnp.arange(rows)

    def resident(self, state: Int[Array, " batch"]) -> Int[Array, " batch"]:
        return state

    def overflows(self, state: Int[Array, " batch"], arrays: KeysValues) -> Bool[Array, " batch"]:
        return state > arrays.keys.shape[1]


def _places(
    length: Int[Array, " batch"], count: Int[Array, " batch"], rows: int
) -> tuple[Array, Array]:
    """Slots of new tokens, and which of them are real."""
    row = jnp.arange(rows)
    return length[:, None] + row, row < count[:, None]
