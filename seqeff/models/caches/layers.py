"""The caches of a model's layers, whatever their kinds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from seqeff.models.caches.protocol import CachedAttention, CacheKind, Sizes
from seqeff.models.caches.whole import WholeCache


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
        # arrays of their own, which can be donated
        (state, first), *others = (kind.empty(sizes) for _ in range(layers))
        return cls(state, (first, *(arrays for _, arrays in others)), kind)

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
    return attention.cache() if isinstance(attention, CachedAttention) else WholeCache(attention)


def select_rows(cache: Any, rows: Int[Array, " rows"]) -> Any:
    """The cache with these rows of the batch, in this order; of a model's or of some layers."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), cache)


def where_rows(rows: Bool[Array, " batch"], cache: Any, other: Any) -> Any:
    """The cache in these rows, of as many or of one that stands for each; in the rest the other."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(rows.reshape(-1, *(1,) * (y.ndim - 1)), x, y)

    return jax.tree.map(choose, cache, other)


def replace_rows(cache: Any, rows: Int[Array, " rows"], others: Any) -> Any:
    """The cache with its rows replaced by those of another that has as many."""
    return jax.tree.map(lambda x, other: x.at[rows].set(other), cache, others)
