"""Keys and values in slots."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from seqeff.models.caches.protocol import Sizes


class KeysValues(NamedTuple):
    """Entries of a layer."""

    keys: Float[Array, "batch slots kv_heads head_dim"]
    values: Float[Array, "batch slots kv_heads head_dim"]

    @classmethod
    def empty(cls, sizes: Sizes, slots: int) -> KeysValues:
        """Zeros."""
        shape = (sizes.batch, slots, sizes.kv_heads, sizes.head_dim)
        return cls(jnp.zeros(shape, sizes.dtype), jnp.zeros(shape, sizes.dtype))

    def put(self, slot: Array, new: KeysValues, where: Array) -> KeysValues:
        """With entries written to slots where asked to."""
        return KeysValues(*(put(x, slot, y, where) for x, y in zip(self, new, strict=True)))

    def pick(self, slot: Array) -> KeysValues:
        """The entries in slots."""
        return KeysValues(*(pick(x, slot) for x in self))


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
    line, capacity = jnp.arange(array.shape[0])[:, None], array.shape[1]
    # past the end, and there each at a place of its own: they are unique, and thus quick to write
    slot = jnp.where(where, slot, capacity + jnp.arange(slot.shape[1]))
    new = new.astype(array.dtype)
    return array.at[line, slot].set(new, mode="drop", unique_indices=True)


def pick(
    array: Shaped[Array, "batch slots *features"], slot: Int[Array, "batch rows"]
) -> Shaped[Array, "batch rows *features"]:
    """Reads entries from slots, all of which exist."""
    slot = slot.reshape(*slot.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, slot, axis=1, mode="promise_in_bounds")
