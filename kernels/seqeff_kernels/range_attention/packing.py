"""Packing: the chosen tokens of each row of the batch, moved to the front in their order."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, Shaped


class PackedIndices(NamedTuple):
    """Where the chosen tokens are; in a `RangeSource` these must be finite, in a range or not.

    Attributes:
      indices: the token at each packed entry, ascending; entries past the number of chosen tokens
        are padding, hold some valid index, and must lie outside every range.
      count: how many tokens at or before each token are chosen; `count_i` is thus the packed
        entry after the last chosen one up to i, and `count_i - 1` is the entry of a chosen i.
    """

    indices: Int[Array, "batch capacity"]
    count: Int[Array, "batch length"]

    @property
    def overflows(self) -> Bool[Array, " batch"]:
        """Whether more tokens are chosen than there is capacity for."""
        return self.count[:, -1] > self.indices.shape[1]


def pack(mask: Bool[Array, "batch length"], capacity: int | None = None) -> PackedIndices:
    """Packs the tokens where `mask` is true.

    Args:
      mask: the chosen tokens.
      capacity: number of packed entries; None: the length, which nothing can overflow. With fewer,
        check `PackedIndices.overflows`; `gather` returns NaN for a row of the batch that overflows.
    """
    batch, length = mask.shape
    capacity = length if capacity is None else min(capacity, length)
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    entry = jnp.where(mask, count - 1, capacity)
    token = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), mask.shape)
    place = jax.vmap(lambda into, at, what: into.at[at].set(what, mode="drop"))
    return PackedIndices(place(jnp.zeros((batch, capacity), jnp.int32), entry, token), count)


def gather(
    array: Shaped[Array, "batch length *features"], packed: PackedIndices
) -> Shaped[Array, "batch capacity *features"]:
    """The packed entries of `array`.

    The gradient is a gather too, hence deterministic: each token is packed at most once. A row of
    the batch whose chosen tokens exceed the capacity becomes NaN, so that no entry is dropped
    unseen.
    """
    entries = _gather(array, packed)
    if packed.indices.shape[1] == packed.count.shape[1]:
        return entries
    overflows = packed.overflows.reshape(-1, *(1,) * (array.ndim - 1))
    return jnp.where(overflows, jnp.nan, entries)


@jax.custom_vjp
def _gather(array: Array, packed: PackedIndices) -> Array:
    return _take(array, packed.indices)


def _gather_forward(array: Array, packed: PackedIndices) -> tuple[Array, Array]:
    return _take(array, packed.indices), packed.count


def _gather_backward(count: Array, gradient: Array) -> tuple[Array, None]:
    return ungather(gradient, count), None


_gather.defvjp(_gather_forward, _gather_backward)


def ungather(
    entries: Shaped[Array, "batch capacity *features"], count: Int[Array, "batch length"]
) -> Shaped[Array, "batch length *features"]:
    """The transpose of `gather`: each chosen token's entry, and 0 for the other tokens."""
    chosen = jnp.diff(count, axis=1, prepend=0) > 0
    entry = jnp.clip(count - 1, 0, entries.shape[1] - 1)
    chosen = chosen.reshape(*chosen.shape, *(1,) * (entries.ndim - 2))
    return jnp.where(chosen, _take(entries, entry), 0)


def _take(array: Array, indices: Array) -> Array:
    indices = indices.reshape(*indices.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, indices, axis=1, mode="promise_in_bounds")
