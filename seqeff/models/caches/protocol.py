"""What a cache must do: remember a row's tokens, so that the next ones can attend them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from seqeff.models.heads import Heads
from seqeff_kernels.range_attention import Backend


class Sizes(NamedTuple):
    """Of a layer's cache.

    Attributes:
      capacity: most tokens that a row has, for caches that keep all or might.
      kept: most of them that caches of chosen tokens keep, where these grow.
    """

    batch: int
    capacity: int
    kept: int
    kv_heads: int
    head_dim: int
    dtype: DTypeLike


class CacheKind(Protocol):
    """How the layers of one attention remember.

    A kind is static: a frozen dataclass. Its `state` is what all those layers share, such as how
    many tokens there are; its `arrays` are a layer's own keys and values. The batch is the first
    axis of every array, and its rows never mix, so a row can be moved or replaced by moving its
    part of every array.
    """

    @property
    def grows(self) -> bool:
        """Whether its memory is that of `Sizes.capacity`, and not constant."""
        ...

    def empty(self, sizes: Sizes) -> tuple[Any, Any]:
        """State and arrays of rows without tokens."""
        ...

    def begin(
        self, state: Any, tokens: Int[Array, "batch rows"], count: Int[Array, " batch"]
    ) -> tuple[Any, Any]:
        """What all layers need to take the new tokens in, and the state after them.

        Args:
          count: how many of each row's tokens are real; the others, at the end, are passed over.
        """
        ...

    def attend(
        self, step: Any, arrays: Any, heads: Heads, backend: Backend
    ) -> tuple[Float[Array, "batch rows heads head_dim"], Any]:
        """What a layer's new tokens attend, and its arrays with them.

        The outputs of tokens that are passed over are of no meaning.
        """
        ...

    def settle(self, step: Any, arrays: Sequence[Any]) -> Sequence[Any]:
        """The arrays of all the layers, once all have attended; most kinds have nothing to do."""
        ...

    def read(self, step: Any, rows: int) -> Int[Array, "batch rows"]:
        """How many entries of a layer each new token attends, itself included."""
        ...

    def resident(self, state: Any) -> Int[Array, " batch"]:
        """How many entries a layer holds of each row."""
        ...


@runtime_checkable
class CachedAttention(Protocol):
    """An attention that knows a cache of its own; others keep every token."""

    def cache(self) -> CacheKind: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayersCache:
    """The cache of neighbouring layers that attend alike; each layer has arrays of its own."""

    state: Any
    arrays: tuple[Any, ...]
    kind: CacheKind = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, kind: CacheKind, layers: int, sizes: Sizes) -> LayersCache:
        """Of rows without tokens."""
        state, _ = kind.empty(sizes)
        return cls(state, tuple(kind.empty(sizes)[1] for _ in range(layers)), kind)

    def entries(
        self, tokens: Int[Array, "batch rows"], count: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch rows"], Int[Array, " batch"]]:
        """Entries of a layer that further tokens read, and the most that it holds meanwhile."""
        rows = tokens.shape[1]
        step, state = self.kind.begin(self.state, tokens, count)
        read = self.kind.read(step, rows)
        # a further token reads no more than what is held before it, and itself
        before = jnp.where(jnp.arange(rows) < count[:, None], read - 1, 0)[:, 1:]
        return read, jnp.maximum(self.kind.resident(state), before.max(1, initial=0))


def kind_of(attention: Any) -> CacheKind:
    """The kind of cache that an attention decodes with."""
    from seqeff.models.caches.whole import WholeCache

    return attention.cache() if isinstance(attention, CachedAttention) else WholeCache(attention)


def aligned(count: int) -> int:
    """Slots for so many entries; a multiple of 8 can be read by Hopper's copy engine."""
    return -(-max(count, 1) // 8) * 8


def put(
    array: Shaped[Array, "batch slots *features"],
    slot: Int[Array, "batch rows"],
    new: Shaped[Array, "batch rows *features"],
    where: Bool[Array, "batch rows"],
) -> Shaped[Array, "batch slots *features"]:
    """Writes entries to slots, where asked to; no two of them to the same."""
    line = jnp.arange(array.shape[0])[:, None]
    slot = jnp.where(where, slot, array.shape[1])
    return array.at[line, slot].set(new.astype(array.dtype), mode="drop")


def pick(
    array: Shaped[Array, "batch slots *features"], slot: Int[Array, "batch rows"]
) -> Shaped[Array, "batch rows *features"]:
    """Reads entries from slots, all of which exist."""
    slot = slot.reshape(*slot.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, slot, axis=1, mode="promise_in_bounds")


def select_rows(cache: Any, rows: Int[Array, " rows"]) -> Any:
    """The cache with these rows of the batch, in this order; of a model's or of some layers."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), cache)


def replace_rows(cache: Any, rows: Int[Array, " rows"], others: Any) -> Any:
    """The cache with its rows replaced by those of another that has as many."""
    return jax.tree.map(lambda x, other: x.at[rows].set(other), cache, others)
