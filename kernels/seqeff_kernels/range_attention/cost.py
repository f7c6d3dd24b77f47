"""What the operation costs: the tiles that ranges visit, hence FLOPs executed and FLOPs needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from seqeff_kernels.range_attention.sources import Source

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one call, summed over the batch and the query heads.

    A pair is one query row of one head with one entry: two dot products of `head_dim` forward,
    five backward (scores again, and the gradients of weights, values, queries and keys).

    Attributes:
      tiles: tiles visited, of `tile_rows` rows by `tile_entries` entries of one head.
      needed_pairs: pairs inside the ranges.
      executed_pairs: pairs in the visited tiles.
    """

    tiles: int
    needed_pairs: int
    executed_pairs: int
    head_dim: int

    @property
    def forward_flops(self) -> int:
        """FLOPs needed by the forward pass."""
        return 4 * self.head_dim * self.needed_pairs

    @property
    def backward_flops(self) -> int:
        """FLOPs needed by the backward pass."""
        return 10 * self.head_dim * self.needed_pairs

    @property
    def executed_forward_flops(self) -> int:
        """FLOPs of the tiles that the forward pass visits."""
        return 4 * self.head_dim * self.executed_pairs

    @property
    def executed_backward_flops(self) -> int:
        """FLOPs of the tiles that a backward pass with the same tiles visits."""
        return 10 * self.head_dim * self.executed_pairs


def cost(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: Sequence[Source],
    *,
    tile_rows: int = 128,
    tile_entries: int = 128,
    batch_shares_tiles: bool = False,
) -> Cost:
    """The cost of `range_attention(queries, sources)` done in tiles.

    Args:
      queries: only the shape is read.
      sources: only the keys' shapes and the bounds are read; the bounds must be concrete.
      tile_rows: query rows of a tile.
      tile_entries: entries of a tile.
      batch_shares_tiles: a tile that one row of the batch or one KV head needs is done for all of
        them, as the portable form does.
    """
    batch, rows, heads, head_dim = queries.shape
    tiles = needed = 0
    for source in sources:
        kv_heads = source.keys.shape[2]
        start, end = source.bounds(rows)
        # on the host, where nothing has to be compiled for each size of a tile
        start, end = np.asarray(start), np.asarray(end)
        first, last = tile_range(start, end, tile_rows, tile_entries)
        if batch_shares_tiles:
            first, last = first.min((0, 1), keepdims=True), last.max((0, 1), keepdims=True)
        visited = np.maximum(last - first, 0)
        pairs = np.maximum(end.astype(np.int64) - start, 0)
        spread = (batch, kv_heads)
        tiles += int(np.broadcast_to(visited, (*spread, visited.shape[-1])).sum())
        needed += int(np.broadcast_to(pairs, (*spread, rows)).sum())
    group = heads // sources[0].keys.shape[2]
    return Cost(
        tiles=tiles * group,
        needed_pairs=needed * group,
        executed_pairs=tiles * group * tile_rows * tile_entries,
        head_dim=head_dim,
    )


def tile_range(
    start: Int[AnyArray, "*heads rows"],
    end: Int[AnyArray, "*heads rows"],
    tile_rows: int,
    tile_entries: int,
) -> tuple[Int[AnyArray, "*heads row_tiles"], Int[AnyArray, "*heads row_tiles"]]:
    """First entry tile that each tile of rows visits, and the one after its last.

    The first is not below the last where no row of the tile attends anything.
    """
    xp: Any = np if isinstance(start, np.ndarray) else jnp
    start, end = (tile_bounds(b, tile_rows) for b in (start, end))
    occupied = start < end
    # -1 // n + 1 is 0: a tile without rows to do ends before it begins
    first = xp.where(occupied, start, jnp.iinfo(jnp.int32).max).min(-1) // tile_entries
    last = (xp.where(occupied, end, 0).max(-1) - 1) // tile_entries + 1
    return first, last


def tile_bounds(
    bound: Int[AnyArray, "*heads rows"], tile_rows: int
) -> Int[AnyArray, "*heads row_tiles tile_rows"]:
    """Bounds by tile of rows; the rows that fill the last tile are empty, with bounds of 0."""
    missing = -bound.shape[-1] % tile_rows
    xp: Any = np if isinstance(bound, np.ndarray) else jnp
    padded = xp.pad(bound, [(0, 0)] * (bound.ndim - 1) + [(0, missing)])
    return padded.reshape(*bound.shape[:-1], -1, tile_rows)
