"""Keys and values in slots."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from seqeff.models.caches.protocol import Sizes
from seqeff.models.heads import Heads
from seqeff_kernels.range_attention import Backend
from seqeff_kernels.rotate_and_append import automatic, obstacle, rotate_and_append
from seqeff_kernels.rotate_and_append import put as put_at


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

    def append(
        self, slot: Array, heads: Heads, where: Array, backend: Backend
    ) -> tuple[Array, KeysValues]:
        """Queries, and this with the heads' entries written to slots where asked to."""
        joined = heads.joined
        if joined is None or not _is_kernel(backend, joined.columns, self.keys):
            return heads.queries, self.put(slot, KeysValues(heads.keys, heads.values), where)
        queries, *entries = rotate_and_append(
            joined.columns,
            *self,
            jnp.where(where, slot, -1),
            joined.rotation,
            heads=heads.queries.shape[2],
            bias=joined.bias,
            interleaved=joined.interleaved,
            backend="triton",
        )
        return queries, KeysValues(*entries)

    def pick(self, slot: Array) -> KeysValues:
        """The entries in slots."""
        return KeysValues(*(pick(x, slot) for x in self))


def aligned(count: int) -> int:
    """Slots for so many entries; a multiple of 8 can be read by Hopper's copy engine."""
    return -(-max(count, 1) // 8) * 8


def _is_kernel(backend: Backend, joined: Array, keys: Array) -> bool:
    """Whether a kernel is to rotate and write, where attention is to be done by this backend."""
    if backend == "auto":
        return automatic(joined, keys) == "triton"
    return backend == "triton" and obstacle(joined, keys, "triton") is None


def put(
    array: Shaped[Array, "batch slots *features"],
    slot: Int[Array, "batch rows"],
    new: Shaped[Array, "batch rows *features"],
    where: Bool[Array, "batch rows"],
) -> Shaped[Array, "batch slots *features"]:
    """Writes entries to slots, where asked to; no two of them to the same."""
    return put_at(array, jnp.where(where, slot, -1), new)


def pick(
    array: Shaped[Array, "batch slots *features"], slot: Int[Array, "batch rows"]
) -> Shaped[Array, "batch rows *features"]:
    """Reads entries from slots, all of which exist."""
    slot = slot.reshape(*slot.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, slot, axis=1, mode="promise_in_bounds")
