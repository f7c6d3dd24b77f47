"""The portable form: plain JAX that visits only the tiles that the ranges touch.

The rows go in tiles. For each, a loop with a traced number of steps visits the entry tiles from
the lowest start to the highest end of its rows, over the whole batch, with an online softmax. The
backward pass walks the same tiles in the same order, so it is deterministic. A tile that holds
nothing for a row leaves that row's numbers as they were, bit for bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import min_dim
from jaxtyping import Bool, Float, Int

from seqeff_kernels.range_attention.cost import tile_bounds, tile_range
from seqeff_kernels.range_attention.execution import Execution, Walk
from seqeff_kernels.range_attention.sources import ListedSource, Source

# finite, so that the difference of two of them is 0 and not NaN
_LOWEST = float(jnp.finfo(jnp.float32).min)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def obstacle(queries: Array, sources: tuple[Source, ...]) -> str | None:
    """Why this backend cannot serve, or None: the portable form serves everything."""
    del queries, sources


def attend(
    queries: Float[Array, "batch rows heads head_dim"], sources: tuple[Source, ...], scale: float
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `range_attention`."""
    rows = queries.shape[1]
    entries = tuple(source.listed(rows) for source in sources)
    clean = tuple(source.is_clean(rows) for source in sources)
    return cast(tuple[Array, Array], _attend(queries, entries, scale, clean))


def execution(queries: Array, sources: tuple[Source, ...]) -> Execution:
    """How this backend serves a call."""
    rows = queries.shape[1]
    tiles = [(tile_sizes(rows, 1)[0], tile_sizes(rows, source.entries)[1]) for source in sources]
    forward, backward = (
        [Walk(index, *sizes, products, True) for index, sizes in enumerate(tiles)]
        for products in (2, 5)
    )
    return Execution(backend="xla", plan={}, deterministic=True, forward=forward, backward=backward)


def gradients(
    queries: Float[Array, "batch rows heads head_dim"],
    source: Source,
    outputs: tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]],
    output_gradients: tuple[Array, Array],
    scale: float,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values, for another backend's outputs with `source` alone."""
    rows = queries.shape[1]
    entries = source.listed(rows)._replace(queries=None)
    clean = (source.is_clean(rows),)
    queries_gradient, ((_, keys_gradient, values_gradient),) = _backward(
        queries, (entries,), outputs, output_gradients, scale, clean
    )
    return queries_gradient, keys_gradient, values_gradient


def tile_sizes(rows: int, entries: int) -> tuple[int, int]:
    """Rows and entries of a tile.

    On CPUs small tiles win, as they stay in the cache; on accelerators every tile costs a kernel
    launch. Few rows, as in decoding, take more entries at once.

    Args:
      rows: of the call. A symbolic dimension of `jax.export` must be a multiple of `tile_side()`.
      entries: of the source; any symbolic dimension serves.
    """
    side = tile_side()
    tile_rows = min_dim(rows, side)
    most = max(side, min(16 * side, side * side // tile_rows))
    return tile_rows, min_dim(entries, most)


def tile_side() -> int:
    """Rows and entries of a tile where there are as many."""
    return 64 if jax.default_backend() == "cpu" else 256


class _RowTiles(NamedTuple):
    """A source's queries and bounds, and the entry tiles to visit, by tile of rows."""

    queries: Float[Array, "row_tiles batch kv_heads group*tile_rows head_dim"] | None
    start: Int[Array, "row_tiles batch_or_1 kv_heads_or_1 tile_rows"]
    end: Int[Array, "row_tiles batch_or_1 kv_heads_or_1 tile_rows"]
    first: Int[Array, " row_tiles"]
    last: Int[Array, " row_tiles"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(
    queries: Array, sources: tuple[ListedSource, ...], scale: float, clean: tuple[bool, ...]
) -> tuple[Array, Array]:
    return _forward(queries, sources, scale, clean)


def _attend_forward(queries, sources, scale, clean):
    # named so that a rematerialisation policy can keep them, and the backward alone runs again
    output, logsumexp = checkpoint_name(_forward(queries, sources, scale, clean), "range_attention")
    return (output, logsumexp), (queries, sources, output, logsumexp)


def _attend_backward(scale, clean, saved, gradients):
    queries, sources, output, logsumexp = saved
    queries_gradient, source_gradients = _backward(
        queries, sources, (output, logsumexp), gradients, scale, clean
    )
    return queries_gradient, tuple(
        # None: integers have no gradient
        source._replace(queries=own, keys=keys, values=values, start=None, end=None)
        for source, (own, keys, values) in zip(sources, source_gradients, strict=True)
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    queries: Array, sources: tuple[ListedSource, ...], scale: float, clean: tuple[bool, ...]
) -> tuple[Array, Array]:
    rows, heads = queries.shape[1:3]
    kv_heads = sources[0].keys.shape[2]
    tile_rows = tile_sizes(rows, 1)[0]

    def one_row_tile(_, tiles):
        shared, row_tiles = tiles
        statistics = (*shared.shape[:-1], 1)
        carry = (
            jnp.zeros(shared.shape, jnp.float32),
            jnp.full(statistics, _LOWEST, jnp.float32),
            jnp.zeros(statistics, jnp.float32),
        )
        for source, tile, is_clean in zip(sources, row_tiles, clean, strict=True):
            own = shared if tile.queries is None else tile.queries
            visit = functools.partial(_visit, own, source, tile, scale, is_clean)
            carry = lax.fori_loop(tile.first, tile.last, visit, carry)
        weighted, maximum, total = carry
        empty = total == 0
        output = weighted / jnp.where(empty, 1, total)
        logsumexp = jnp.where(empty, -jnp.inf, maximum + jnp.log(jnp.where(empty, 1, total)))
        return None, (output.astype(queries.dtype), logsumexp)

    row_tiles = tuple(_row_tiles(source, tile_rows) for source in sources)
    shared = _split_rows(queries, kv_heads, tile_rows)
    _, (output, logsumexp) = lax.scan(one_row_tile, None, (shared, row_tiles))
    return _join_rows(output, rows, heads), _join_rows(logsumexp, rows, heads)[..., 0]


def _visit(queries, source, tile, scale, is_clean, index, carry):
    """Adds one entry tile to the online softmax of one row tile."""
    weighted, maximum, total = carry
    begin, mask = _mask(source, tile, index)
    keys, values = (_take(x, begin, mask.shape[-1]) for x in (source.keys, source.values))
    if not is_clean:
        values = _where_attended(mask, values)
    scores = _dot("bkmd,bekd->bkme", queries, keys) * scale
    mask = _for_all_heads(mask, scores)
    scores = jnp.where(mask, scores, _LOWEST)
    new_maximum = jnp.maximum(maximum, scores.max(-1, keepdims=True))
    # a row without entries so far has exp(lowest - lowest) = 1 for a masked entry
    weights = jnp.where(mask, jnp.exp(scores - new_maximum), 0)
    correction = jnp.exp(maximum - new_maximum)
    weighted = weighted * correction + _dot("bkme,bekd->bkmd", weights.astype(values.dtype), values)
    return weighted, new_maximum, total * correction + weights.sum(-1, keepdims=True)


def _backward(
    queries: Array,
    sources: tuple[ListedSource, ...],
    outputs: tuple[Array, Array],
    output_gradients: tuple[Array, Array],
    scale: float,
    clean: tuple[bool, ...],
) -> tuple[Array, list[tuple[Array | None, Array, Array]]]:
    """Gradients of the queries, and of each source's own queries, keys and values."""
    (output, logsumexp), (output_gradient, logsumexp_gradient) = outputs, output_gradients
    rows, heads = queries.shape[1:3]
    kv_heads = sources[0].keys.shape[2]
    tile_rows = tile_sizes(rows, 1)[0]
    # d score = weight * (d weight - sum of output * d output + d logsumexp)
    offset = jnp.sum(output.astype(jnp.float32) * output_gradient.astype(jnp.float32), -1)
    offset = offset - logsumexp_gradient
    # an empty row has only masked entries, whose weights need no finite logsumexp
    logsumexp = jnp.where(jnp.isneginf(logsumexp), 0, logsumexp)

    def one_row_tile(entry_gradients, tiles):
        shared, row_tiles, *rest = tiles
        shared_gradient = jnp.zeros(shared.shape, jnp.float32)
        own_gradients, new_entry_gradients = [], []
        for source, tile, is_clean, (keys_gradient, values_gradient) in zip(
            sources, row_tiles, clean, entry_gradients, strict=True
        ):
            own = shared if tile.queries is None else tile.queries
            begins_with = (
                shared_gradient if tile.queries is None else jnp.zeros_like(shared_gradient)
            )
            visit = functools.partial(_visit_backward, own, source, tile, scale, is_clean, *rest)
            gradient, keys_gradient, values_gradient = lax.fori_loop(
                tile.first, tile.last, visit, (begins_with, keys_gradient, values_gradient)
            )
            new_entry_gradients.append((keys_gradient, values_gradient))
            if tile.queries is None:
                shared_gradient = gradient
                own_gradients.append(None)
            else:
                own_gradients.append(gradient.astype(own.dtype))
        return new_entry_gradients, (shared_gradient.astype(queries.dtype), own_gradients)

    split = functools.partial(_split_rows, kv_heads=kv_heads, tile_rows=tile_rows)
    row_tiles = tuple(_row_tiles(source, tile_rows) for source in sources)
    entry_gradients, (shared_gradient, own_gradients) = lax.scan(
        one_row_tile,
        [
            (jnp.zeros_like(s.keys, jnp.float32), jnp.zeros_like(s.values, jnp.float32))
            for s in sources
        ],
        (
            split(queries),
            row_tiles,
            split(output_gradient.astype(queries.dtype)),
            split(logsumexp[..., None]),
            split(offset[..., None]),
        ),
    )
    source_gradients = [
        (
            None if own is None else _join_rows(own, rows, heads),
            keys_gradient.astype(source.keys.dtype),
            values_gradient.astype(source.values.dtype),
        )
        for source, own, (keys_gradient, values_gradient) in zip(
            sources, own_gradients, entry_gradients, strict=True
        )
    ]
    return _join_rows(shared_gradient, rows, heads), source_gradients


def _visit_backward(
    queries, source, tile, scale, is_clean, output_gradient, logsumexp, offset, index, carry
):
    """Adds one entry tile to the gradients of one row tile and of the entries."""
    queries_gradient, keys_gradient, values_gradient = carry
    begin, mask = _mask(source, tile, index)
    keys, values = (_take(x, begin, mask.shape[-1]) for x in (source.keys, source.values))
    if not is_clean:
        keys = _where_attended(mask, keys)
    scores = _dot("bkmd,bekd->bkme", queries, keys) * scale
    mask = _for_all_heads(mask, scores)
    weights = jnp.where(mask, jnp.exp(scores - logsumexp), 0)
    weights_gradient = _dot("bkmd,bekd->bkme", output_gradient, values)
    scores_gradient = jnp.where(mask, weights * (weights_gradient - offset) * scale, 0)
    scores_gradient = scores_gradient.astype(queries.dtype)
    weights = weights.astype(output_gradient.dtype)
    return (
        queries_gradient + _dot("bkme,bekd->bkmd", scores_gradient, keys),
        _add(keys_gradient, begin, _dot("bkme,bkmd->bekd", scores_gradient, queries)),
        _add(values_gradient, begin, _dot("bkme,bkmd->bekd", weights, output_gradient)),
    )


def _row_tiles(source: ListedSource, tile_rows: int) -> _RowTiles:
    kv_heads = source.keys.shape[2]
    tile_entries = tile_sizes(source.start.shape[-1], source.keys.shape[1])[1]
    first, last = tile_range(source.start, source.end, tile_rows, tile_entries)
    own = None if source.queries is None else _split_rows(source.queries, kv_heads, tile_rows)
    start, end = (jnp.moveaxis(tile_bounds(b, tile_rows), 2, 0) for b in (source.start, source.end))
    return _RowTiles(own, start, end, first.min((0, 1)), last.max((0, 1)))


def _mask(
    source: ListedSource, tile: _RowTiles, index: Array
) -> tuple[Array, Bool[Array, "batch_or_1 kv_heads_or_1 tile_rows tile_entries"]]:
    """Where entry tile `index` begins, and which of its entries each row attends."""
    entries = source.keys.shape[1]
    size = tile_sizes(source.start.shape[-1], entries)[1]
    # the last tile overlaps the one before when the size does not divide the entries
    begin = jnp.minimum(index * size, entries - size)
    entry = begin + jnp.arange(size)
    start = jnp.maximum(tile.start, index * size)
    return begin, (entry >= start[..., None]) & (entry < tile.end[..., None])


def _for_all_heads(mask: Bool[Array, "b k rows entries"], scores: Array) -> Bool[Array, "b k m e"]:
    batch, kv_heads, rows, entries = mask.shape
    group = scores.shape[2] // rows
    mask = jnp.broadcast_to(mask[:, :, None], (batch, kv_heads, group, rows, entries))
    return mask.reshape(batch, kv_heads, group * rows, entries)


def _where_attended(mask: Array, entries: Array) -> Array:
    """Zeros the entries that no row of the tile attends: they may be NaN, and 0 * NaN is NaN."""
    return jnp.where(jnp.swapaxes(mask.any(2), 1, 2)[..., None], entries, 0)


def _take(entries: Array, begin: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(entries, begin, size, axis=1)


def _add(entries: Array, begin: Array, update: Array) -> Array:
    updated = _take(entries, begin, update.shape[1]) + update
    return lax.dynamic_update_slice_in_dim(entries, updated, begin, axis=1)


def _split_rows(
    array: Float[Array, "batch rows heads features"], kv_heads: int, tile_rows: int
) -> Float[Array, "row_tiles batch kv_heads group*tile_rows features"]:
    batch, rows, heads, features = array.shape
    group = heads // kv_heads
    padded = jnp.pad(array, ((0, 0), (0, -rows % tile_rows), (0, 0), (0, 0)))
    tiled = padded.reshape(batch, -1, tile_rows, kv_heads, group, features)
    tiled = tiled.transpose(1, 0, 3, 4, 2, 5)
    return tiled.reshape(-1, batch, kv_heads, group * tile_rows, features)


def _join_rows(
    tiles: Float[Array, "row_tiles batch kv_heads group*tile_rows features"], rows: int, heads: int
) -> Float[Array, "batch rows heads features"]:
    count, batch, kv_heads, _, features = tiles.shape
    tiled = tiles.reshape(count, batch, kv_heads, heads // kv_heads, -1, features)
    return tiled.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, features)[:, :rows]
