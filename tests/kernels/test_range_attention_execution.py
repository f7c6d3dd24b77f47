"""What is told of a call's execution, against what the kernels themselves read."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import needs_mosaic

from seqeff_kernels import TokenSource, range_attention, tuning
from seqeff_kernels.range_attention import cudnn, executed_flops, execution, mosaic, triton
from seqeff_kernels.range_attention.shapes import Shape, separator_sources, tokens

SHAPE = Shape(batch=2, length=700, heads=4, kv_heads=2, head_dim=64, density=0.3, window=100)
TILES = mosaic.Tiles(window_entries=128, block_entries=64, backward_tile=64, backward_workers=1)


@pytest.fixture(scope="module")
def call():
    queries, keys, values, chosen = tokens(SHAPE, dtype=jnp.bfloat16)
    return queries, separator_sources(keys, values, chosen, SHAPE.window)


@pytest.fixture
def listed(call, tmp_path, monkeypatch):
    """Lists plans for the call."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    path = tuning.table_path(jax.devices()[0].device_kind)

    def add(backend, plan):
        entry = {"plan": dataclasses.asdict(plan), "milliseconds": {"training": 1.0}}
        tuning.record(path, "attention", backend, tuning.attention_key(*call), entry)

    return add


def flops_of(queries, sources, sizes, products):
    """FLOPs of the tiles of which some row attends some entry, one by one."""
    total = 0
    for source, (rows, entries) in zip(sources, sizes, strict=True):
        start, end = (np.asarray(bound) for bound in source.bounds(SHAPE.length))
        lines = np.broadcast_shapes(start.shape[:2], (SHAPE.batch, SHAPE.kv_heads))
        start, end = (np.broadcast_to(x, (*lines, SHAPE.length)) for x in (start, end))
        entry = np.arange(source.entries)
        mask = (start[..., None] <= entry) & (entry < end[..., None])
        for first in range(0, SHAPE.length, rows):
            for line in mask.reshape(-1, *mask.shape[2:]):
                some = np.flatnonzero(line[first : first + rows].any(0)) // entries
                total += (some.max() - some.min() + 1 if some.size else 0) * rows * entries
    group = SHAPE.heads // SHAPE.kv_heads
    return 2 * products * SHAPE.head_dim * total * group


def test_the_tiles_are_those_of_the_listed_plan(call, listed):
    queries, sources = call
    listed("mosaic", TILES)
    found = mosaic.execution(queries, sources)
    assert mosaic.Tiles(**found.plan) == TILES
    assert found.deterministic
    sizes = [(64, 64), (64, 128)]
    assert executed_flops(queries, sources, found.forward) == flops_of(queries, sources, sizes, 2)
    expected = flops_of(queries, sources, [(64, 64)] * 2, 3 + 4)
    assert executed_flops(queries, sources, found.backward) == expected


def test_plans_that_do_not_fit_are_told_as_they_run(call):
    _, (far, near) = call
    like = jax.ShapeDtypeStruct((2, 700, 4, 128), jnp.bfloat16)
    entries = jax.ShapeDtypeStruct((2, 700, 2, 128), jnp.bfloat16)
    wide = [dataclasses.replace(s, keys=entries, values=entries) for s in (far, near, near)]
    wide[2] = dataclasses.replace(wide[2], queries=jax.ShapeDtypeStruct(like.shape, like.dtype))
    found = mosaic.execution(like, tuple(wide))
    assert found.plan["buffers"] == 1 and not found.plan["take_turns"]


@needs_mosaic
def test_walks_are_what_the_mosaic_kernels_read(call):
    from seqeff_kernels.range_attention.mosaic.gradients import entry_visits

    queries, sources = call
    backward = mosaic.execution(queries, sources).backward
    for index, source in enumerate(sources):
        (walk,) = (w for w in backward if w.source == index and w.products == 4)
        padded = [(0, 0), (0, 0), (0, -700 % walk.tile_rows)]
        start, end = (jnp.pad(b, padded, mode="edge") for b in source.bounds(700))
        table = np.asarray(entry_visits(start, end, source.entries, walk.tile_rows, 2))
        first, _, _, last = np.moveaxis(table.reshape(*table.shape[:2], -1, 4), -1, 0)
        tiles = count(np.maximum(last - first, 0))
        assert executed_flops(queries, sources, [walk]) == tiles * 64 * 64 * 4 * 2 * 64


def test_walks_are_what_the_triton_kernels_read(call):
    queries, sources = call
    found = triton.execution(queries, sources)
    for walk in (*found.forward, *found.backward):
        source = sources[walk.source].listed(700)
        if walk.products < 4:
            visits, size = triton._entry_visits(source, walk.tile_rows), walk.tile_entries
        else:
            entries = sources[walk.source].entries
            visits = triton._row_visits(source, entries, walk.tile_rows, walk.tile_entries)
            size = walk.tile_rows
        first, last = np.asarray(visits[..., 0]), np.asarray(visits[..., 3])
        # of a tile of entries that no row attends, the kernel does one tile more, or returns
        tiles = count(np.where(first < last, -(-(last - first // size * size) // size), 0))
        pairs = tiles * walk.tile_rows * walk.tile_entries
        assert executed_flops(queries, sources, [walk]) == pairs * walk.products * 2 * 64


def count(tiles):
    """Over all heads, of tiles by row of the batch and KV head or for all of them."""
    lines = (SHAPE.batch, SHAPE.kv_heads, tiles.shape[-1])
    return int(np.broadcast_to(tiles, lines).sum()) * (SHAPE.heads // SHAPE.kv_heads)


def test_the_portable_form_tells_its_tiles(call):
    queries, sources = call
    found = execution(queries, sources)
    assert (found.backend, found.plan) == ("xla", {})
    assert executed_flops(queries, sources, found.backward) == 2.5 * executed_flops(
        queries, sources, found.forward
    )


@pytest.mark.parametrize(
    ("backend", "message"),
    [("flash", "'flash' is unknown; give auto"), ("triton", "'triton' cannot serve .* CUDA")],
)
def test_a_backend_that_does_not_serve_is_refused_as_by_the_operation(call, backend, message):
    for operation in (execution, range_attention):
        with pytest.raises(ValueError, match=message):
            operation(*call, backend=backend)


def test_cudnn_is_not_deterministic_unless_asked(call, monkeypatch):
    queries, (_, near) = call
    source = TokenSource(near.keys, near.values)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = cudnn.execution(queries, (source,))
    assert (found.deterministic, found.forward, found.plan) == (False, None, {})
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert cudnn.execution(queries, (source,)).deterministic is None
