"""Named shapes of decoding, and inputs for them, for tests, tuning and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import DTypeLike, Float

from seqeff_kernels.decode_attention.blocks import CacheBlock, NewEntries


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A call of decode_attention.

    Attributes:
      capacities: entries of each cache block.
      rows: newest tokens of each row of the batch.
      new: whether the rows bring their own keys and values.
    """

    batch: int
    capacities: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rows: int = 1
    new: bool = False

    @property
    def entries(self) -> int:
        """Of a row of the batch, when all blocks are full."""
        return sum(self.capacities) + (self.rows if self.new else 0)

    def entry_bytes(self, itemsize: int = 2) -> int:
        """Of all keys and values, each read once: the floor of a call."""
        return 2 * self.batch * self.entries * self.kv_heads * self.head_dim * itemsize


SHAPES = {
    "odd": Shape(
        batch=2, capacities=(63, 1000), heads=4, kv_heads=2, head_dim=64, rows=3, new=True
    ),
    "odd-head": Shape(
        batch=2, capacities=(3, 65, 127), heads=5, kv_heads=1, head_dim=80, rows=4, new=True
    ),
    "multi-head": Shape(batch=64, capacities=(4096,), heads=32, kv_heads=32, head_dim=128),
    "grouped": Shape(batch=64, capacities=(4096,), heads=32, kv_heads=8, head_dim=128),
    "factored": Shape(batch=64, capacities=(4096,), heads=64, kv_heads=1, head_dim=256),
    "multi-head-long": Shape(batch=1, capacities=(65536,), heads=32, kv_heads=32, head_dim=128),
    "grouped-long": Shape(batch=1, capacities=(65536,), heads=32, kv_heads=8, head_dim=128),
    "factored-long": Shape(batch=1, capacities=(65536,), heads=64, kv_heads=1, head_dim=256),
    "separators": Shape(
        batch=64, capacities=(3, 512, 256), heads=12, kv_heads=12, head_dim=64, new=True
    ),
    "pythia-160m": Shape(batch=64, capacities=(1152,), heads=12, kv_heads=12, head_dim=64),
    # one request: products of one row are slow, so the engine runs two
    "pythia-160m-two": Shape(batch=2, capacities=(1152,), heads=12, kv_heads=12, head_dim=64),
    "draft": Shape(
        batch=8, capacities=(8192,), heads=32, kv_heads=8, head_dim=128, rows=4, new=True
    ),
}


def inputs(
    shape: Shape, seed: int = 0, dtype: DTypeLike = jnp.float32, full: bool = True
) -> tuple[Float[Array, "batch rows heads head_dim"], tuple[CacheBlock, ...], NewEntries | None]:
    """Random queries, blocks and new entries; blocks are full, or filled to random lengths."""
    keys = iter(jax.random.split(jax.random.key(seed), 3 + 3 * len(shape.capacities)))

    def entries(count: int) -> Array:
        size = (shape.batch, count, shape.kv_heads, shape.head_dim)
        return jax.random.normal(next(keys), size, dtype)

    query_size = (shape.batch, shape.rows, shape.heads, shape.head_dim)
    queries = jax.random.normal(next(keys), query_size, dtype)
    blocks = []
    for capacity in shape.capacities:
        lowest = capacity if full else 0
        filled = jax.random.randint(next(keys), (shape.batch,), lowest, capacity + 1, jnp.int32)
        blocks.append(CacheBlock(entries(capacity), entries(capacity), filled))
    new = (entries(shape.rows), entries(shape.rows)) if shape.new else None
    return queries, tuple(blocks), new
