"""Which tiles of rows a tile of entries visits: the transpose of the rows' walk."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


def row_tile_visits(
    start: Int[Array, "batch_or_1 kv_heads_or_1 rows"],
    end: Int[Array, "batch_or_1 kv_heads_or_1 rows"],
    low: Int[Array, " entry_tiles"],
    high: Int[Array, " entry_tiles"],
    tile_rows: int,
) -> Int[Array, "batch_or_1 kv_heads_or_1 entry_tiles 4"]:
    """The tiles of rows that touch the entries `[low, high)`, and those whose rows attend them all.

    First, first of those, after the last of those, after the last. The rows are whole tiles. It
    takes memory for its arguments and result alone.
    """
    # bounds never decrease: of a tile of rows, the first has the lowest and the last the highest
    first, last = slice(None, None, tile_rows), slice(tile_rows - 1, None, tile_rows)
    bounds = jnp.stack([end[..., last], end[..., first], start[..., last], start[..., first]], -2)
    limits = jnp.stack([low + 1, high, low + 1, high])
    # unrolled, as on GPUs each step of a loop is several kernels
    search = functools.partial(jnp.searchsorted, method="scan_unrolled")
    below = jax.vmap(jax.vmap(jax.vmap(search), (0, None)), (0, None))(bounds, limits)
    return jnp.swapaxes(below, -1, -2).astype(jnp.int32)
