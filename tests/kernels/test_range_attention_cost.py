"""The cost against counting pairs and tiles one by one."""

from __future__ import annotations

import numpy as np
import pytest

from seqeff_kernels import TokenSource, cost


def count(source, rows, group, tile_rows, tile_entries, shared):
    """Pairs needed and tiles visited, where a tile is visited if between two needed ones."""
    kv_heads, entries = source.keys.shape[2], source.keys.shape[1]
    start, end = (np.asarray(b) for b in source.bounds(rows))
    shape = (source.keys.shape[0], kv_heads, rows)
    start, end = (np.broadcast_to(b, shape) for b in (start, end))
    entry = np.arange(entries)
    mask = (entry >= start[..., None]) & (entry < end[..., None])
    needed = mask.sum() * group
    if shared:
        mask = np.broadcast_to(mask.any((0, 1)), mask.shape)
    tiles = 0
    for b, h in np.ndindex(mask.shape[:2]):
        for begin in range(0, rows, tile_rows):
            touched = np.flatnonzero(mask[b, h, begin : begin + tile_rows].any(0)) // tile_entries
            tiles += touched.max() - touched.min() + 1 if touched.size else 0
    return needed, tiles * group


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows, entries", [(63, (63,)), (1, (200,)), (150, (70, 150))])
def test_cost_equals_counting(call, rows, entries, shared):
    for seed in range(3):
        queries, sources = call(seed, rows=rows, entries=entries, per_kv_head=seed == 1)
        got = cost(queries, sources, tile_rows=16, tile_entries=8, batch_shares_tiles=shared)
        counted = [count(s, rows, 2, 16, 8, shared) for s in sources]
        needed, tiles = (sum(c) for c in zip(*counted, strict=True))
        assert (got.needed_pairs, got.tiles) == (needed, tiles)
        assert got.executed_pairs == tiles * 16 * 8
        assert got.forward_flops == 4 * 8 * needed
        assert got.executed_backward_flops == 10 * 8 * tiles * 128


def test_causal_attention_in_closed_form(call):
    queries, (source,) = call(0, rows=512, entries=(512,))
    got = cost(queries, [TokenSource(source.keys, source.values)])
    # 4 heads of 2 rows of the batch; 1 + 2 + 3 + 4 tiles of 128 x 128
    assert got.needed_pairs == 8 * 512 * 513 // 2
    assert got.tiles == 8 * 10


def test_long_contexts_do_not_overflow():
    class Shaped:
        def __init__(self, *shape):
            self.shape, self.ndim = shape, len(shape)

    length = 131072
    keys = Shaped(1, length, 16, 128)
    got = cost(keys, [TokenSource(keys, keys)])
    assert got.needed_pairs == 16 * length * (length + 1) // 2
