"""Decoding by range attention's Mosaic kernel, without a GPU; and the merging of splits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted, lowered, needs_mosaic, shared_memory

from seqeff_kernels import gpu, tuning
from seqeff_kernels.decode_attention import CacheBlock, merge, mosaic, reference
from seqeff_kernels.decode_attention.plan import Sizes
from seqeff_kernels.range_attention.mosaic.tiles import BLOCK, SHARED_MEMORY, Tiles


def call(rows, heads, kv_heads, capacities, filled, new, own=False, head_dim=64):
    """A call whose entries beyond the filled ones are NaN."""
    generator = np.random.default_rng(0)
    batch = len(filled[0])

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.bfloat16)

    blocks = []
    for capacity, lengths in zip(capacities, filled, strict=True):
        beyond = (np.arange(capacity) >= np.asarray(lengths)[:, None])[..., None, None]
        keys, values = (
            jnp.where(beyond, jnp.nan, normal(batch, capacity, kv_heads, head_dim))
            for _ in range(2)
        )
        queries = normal(batch, rows, heads, head_dim) if own and not blocks else None
        blocks.append(CacheBlock(keys, values, jnp.asarray(lengths, jnp.int32), queries))
    entries = normal(2, batch, rows, kv_heads, head_dim)
    queries = normal(batch, rows, heads, head_dim)
    return queries, tuple(blocks), tuple(entries) if new else None


def shapes_of(head_dim, heads, own, blocks=3, new=False):
    """The shapes of a call on one KV head, of which the first `own` blocks have own queries."""
    queries = jax.ShapeDtypeStruct((2, 1, heads, head_dim), jnp.bfloat16)
    entries = jax.ShapeDtypeStruct((2, 512, 1, head_dim), jnp.bfloat16)
    filled = jax.ShapeDtypeStruct((2,), jnp.int32)
    listed = tuple(
        CacheBlock(entries, entries, filled, queries if index < own else None)
        for index in range(blocks)
    )
    fresh = jax.ShapeDtypeStruct((2, 1, 1, head_dim), jnp.bfloat16)
    return queries, listed, (fresh, fresh) if new else None


def test_it_says_why_it_cannot_serve():
    queries, blocks, new = call(1, 8, 1, (64,), ([64],), False)
    if jax.__version_info__ < (0, 11):
        assert "jax 0.11" in mosaic.obstacle(queries, blocks, new)
        return
    assert "compute capability 9.0" in mosaic.obstacle(queries, blocks, new)
    assert "new entries counted, not 4" in mosaic.obstacle(queries, blocks * 3, (queries, queries))


@needs_mosaic
def test_it_says_which_queries_do_not_fit(monkeypatch):
    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "TESTED_JAX", jax.__version__)
    for new, own in ((False, 3), (True, 2)):
        found = mosaic.obstacle(*shapes_of(256, 64, own, blocks=3 - new, new=new))
        assert "3 different queries of head_dim 256 leave no room" in found
        assert mosaic.obstacle(*shapes_of(256, 64, 1, blocks=3 - new, new=new)) is None
        assert mosaic.obstacle(*shapes_of(128, 64, own, blocks=3 - new, new=new)) is None


@needs_mosaic
@pytest.mark.parametrize("own", range(4))
@pytest.mark.parametrize("heads", [32, 64, 128])
@pytest.mark.parametrize("head_dim", mosaic.HEAD_DIMS)
def test_it_lowers_for_hopper_wherever_it_serves(head_dim, heads, own, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "compute_capability", lambda: (9, 0))
        served = mosaic.obstacle(*shapes_of(head_dim, heads, own)) is None
    assert served == (head_dim < 256 or own < 2)
    if served:
        text = lowered(lambda *call: mosaic.attend(*call, 0.1)[0], *shapes_of(head_dim, heads, own))
        assert text.count("@mosaic_gpu_v2") == 1


def test_plans_fit_the_chip():
    for points in (1, 64, 65, 300):
        for head_dim in mosaic.HEAD_DIMS:
            for batch in (1, 64, 500):
                sizes = Sizes(
                    batch=batch, kv_heads=1, points=points, head_dim=head_dim, entries=4096
                )
                planned = mosaic.plan(sizes)
                block = 64 * head_dim * 2
                rows = block * (1 if points <= 64 else 2)
                assert 2 <= planned.stages <= 8
                assert rows + 2 * planned.stages * block <= 227 * 1024
                assert 1 <= planned.splits <= max(1, 132 // batch)


@needs_mosaic
def test_a_plan_that_is_listed_for_fewer_blocks_is_cut_to_what_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    path = tuning.table_path(jax.devices()[0].device_kind)

    def entries_of(count):
        """The call's shapes, whose blocks hold 1024 entries together."""
        queries, blocks, _ = shapes_of(128, 128, own=count - 1, blocks=count)
        capacity = {1: 1024, 3: 320}[count]
        like = jax.ShapeDtypeStruct((2, capacity, 1, 128), jnp.bfloat16)
        return queries, tuple(dataclasses.replace(b, keys=like, values=like) for b in blocks), None

    alone, many = entries_of(1), entries_of(3)
    keys = {Sizes.of(*call).key("bfloat16") for call in (alone, many)}
    listed = mosaic.Plan(splits=5, stages=3, tile_entries=128)
    entry = {"plan": dataclasses.asdict(listed), "milliseconds": {"call": 1.0}}
    (key,) = keys
    tuning.record(path, "decode", "mosaic", key, entry)

    def run(*call):
        return mosaic.attend(*call, 0.1)[0]

    assert mosaic.chosen_plan(*alone) == listed
    assert mosaic.chosen_plan(*many) == dataclasses.replace(listed, tile_entries=64)
    for call in (alone, many):
        assert shared_memory(run, *call) <= SHARED_MEMORY
    assert lowered(run, *many).count("@mosaic_gpu_v2") == 1
    # one that is given is not cut: what was timed is what is listed
    with pytest.raises(ValueError, match="shared memory"):
        lowered(lambda *call: mosaic.attend(*call, 0.1, listed)[0], *many)


@needs_mosaic
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("head_dim", mosaic.HEAD_DIMS)
def test_shared_points_take_the_memory_that_is_counted(head_dim, splits):
    call = shapes_of(head_dim, 64, own=0, blocks=1)
    plan = mosaic.Plan(splits=splits, stages=3, share_points=True)
    assert plan.fitted(Sizes.of(*call)) == plan
    found = shared_memory(lambda *call: mosaic.attend(*call, 0.1, plan)[0], *call)
    tiles = Tiles(
        workers=2, block_entries=64, stages=3, buffers=1, take_turns=False, share_rows=True
    )
    assert found <= tiles.shared_memory(head_dim, 1, 1) <= found + 1024
    with pytest.raises(ValueError, match="share_rows needs 2 workers"):
        Tiles(workers=1, share_rows=True)


def test_merging_splits():
    generator = np.random.default_rng(0)
    output = generator.normal(size=(2, 3, 5, 8)).astype(np.float32)
    logsumexp = generator.normal(size=(2, 3, 5)).astype(np.float32)
    logsumexp[0, 1] = logsumexp[1, :, 2] = -np.inf
    output[0, 1], output[1, 0, 2] = np.nan, np.nan
    merged, total = merge.merge(jnp.asarray(output), jnp.asarray(logsumexp), jnp.float32)
    expected = np.logaddexp.reduce(logsumexp.astype(np.float64), axis=1)
    np.testing.assert_allclose(total, expected, rtol=1e-6, atol=1e-6)
    weights = np.exp(logsumexp - np.where(np.isinf(expected), 0, expected)[:, None])
    exact = (np.nan_to_num(output) * weights[..., None]).sum(1)
    np.testing.assert_allclose(merged, exact, rtol=1e-5, atol=1e-6)


CASES = {
    "one block, some empty": call(1, 6, 1, (150,), ([150, 0, 37],), False),
    "two blocks and new entries": call(3, 4, 2, (70, 130), ([70, 1], [0, 65]), True),
    "own queries, more points than a worker's": call(
        3, 24, 1, (90, 40), ([65, 90], [40, 3]), True, own=True
    ),
}


@needs_mosaic
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("splits", "tile_entries", "stages", "share"),
    [(1, 64, 2, False), (3, 64, 2, False), (2, 128, 2, False), (1, 64, 3, True), (2, 64, 2, True)],
)
def test_interpreted_kernels_equal_the_reference(
    name, splits, tile_entries, stages, share, monkeypatch
):
    queries, blocks, new = CASES[name]
    # two workers with points of their own race to clear a tile that they share, but write the same
    alone = share or Sizes.of(queries, blocks, new).points <= BLOCK
    with interpreted(monkeypatch, detect_races=alone):
        plan = mosaic.Plan(
            splits=splits, stages=stages, tile_entries=tile_entries, share_points=share
        )
        output, logsumexp = mosaic.attend(queries, blocks, new, 0.2, plan)
    want, want_logsumexp = reference.attend(queries, blocks, new, 0.2)
    np.testing.assert_allclose(logsumexp, want_logsumexp, rtol=1e-5, atol=1e-5)
    difference = np.asarray(output, np.float32) - np.asarray(want, np.float32)
    assert np.linalg.norm(difference) <= 1e-2 * np.linalg.norm(np.asarray(want, np.float32))
