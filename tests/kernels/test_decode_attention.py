"""The reference against softmax a row at a time; the portable form against the reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels import RangeSource, gpu, range_attention
from seqeff_kernels.decode_attention import (
    CacheBlock,
    decode_attention,
    execution,
    explain,
    mosaic,
    triton,
)
from seqeff_kernels.decode_attention import plan as planning
from seqeff_kernels.decode_attention.plan import MAXIMUM_SPLITS, Plan, Sizes, plan, query_tile
from seqeff_kernels.decode_attention.shapes import SHAPES, inputs

SCALE = 0.3
# the two sum in different orders
FLOAT32 = 1e-5
# weights are rounded to 8 bits before the second product
BFLOAT16 = 2e-2

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
random_inputs = quick_jit(inputs, static_argnames=("shape", "dtype", "full"))


@functools.partial(quick_jit, static_argnames=("scale", "backend"))
def decode(queries, blocks, new=None, scale=SCALE, backend="xla"):
    return decode_attention(queries, blocks, new=new, scale=scale, backend=backend)


def make_call(seed, *, filled, rows=1, heads=4, kv_heads=2, head_dim=16, new=False, own=False):
    """`filled` is one list of lengths and a capacity a block; entries beyond a length are NaN."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    batch = len(filled[0][0])
    blocks = []
    for lengths, capacity in filled:
        keys, values = (normal(batch, capacity, kv_heads, head_dim) for _ in range(2))
        for row, length in enumerate(lengths):
            keys[row, length:], values[row, length:] = np.nan, np.nan
        queries = normal(batch, rows, heads, head_dim) if own and not blocks else None
        blocks.append(CacheBlock(keys, values, np.array(lengths, np.int32), queries))
    pair = tuple(normal(batch, rows, kv_heads, head_dim) for _ in range(2)) if new else None
    return normal(batch, rows, heads, head_dim), tuple(blocks), pair


def by_rows(queries, blocks, new, scale=SCALE):
    """One row at a time, in float64."""
    batch, rows, heads, _ = queries.shape
    output, logsumexp = np.zeros(queries.shape), np.full((batch, rows, heads), -np.inf)
    for b, i, h in np.ndindex(batch, rows, heads):
        scores, values = [], []
        pieces = [
            (queries if x.queries is None else x.queries, x.keys, x.values, x.filled[b])
            for x in blocks
        ]
        pieces += [] if new is None else [(queries, *new, i + 1)]
        for own, keys, block_values, count in pieces:
            head = h // (heads // keys.shape[2])
            scores.append(keys[b, :count, head].astype(np.float64) @ own[b, i, h] * scale)
            values.append(block_values[b, :count, head].astype(np.float64))
        scores, values = np.concatenate(scores), np.concatenate(values)
        if scores.size:
            logsumexp[b, i, h] = np.logaddexp.reduce(scores)
            output[b, i, h] = np.exp(scores - logsumexp[b, i, h]) @ values
    return output, logsumexp


CALLS = {
    "one row": {"filled": [([63, 0, 17], 63)]},
    "odd": {"filled": [([1000, 1], 1000), ([0, 63], 63)], "rows": 3, "new": True},
    "one head": {"filled": [([5, 63], 63)], "heads": 3, "kv_heads": 1, "rows": 2, "new": True},
    "own queries": {"filled": [([9, 0], 9), ([0, 30], 63)], "rows": 4, "new": True, "own": True},
    "three blocks": {"filled": [([3], 3), ([0], 1), ([62], 100)], "kv_heads": 4, "own": True},
    "nothing cached": {"filled": [([0, 0], 7)], "rows": 4, "new": True},
    "nothing": {"filled": [([0, 2], 7), ([0, 0], 2)], "rows": 2},
}


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_softmax_of_what_each_row_attends(name, backend):
    call = make_call(0, **CALLS[name])
    output, logsumexp = decode(*call, backend=backend)
    expected_output, expected_logsumexp = by_rows(*call)
    np.testing.assert_allclose(output, expected_output, atol=FLOAT32)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=FLOAT32)
    empty = np.isneginf(expected_logsumexp)
    assert np.all(np.asarray(output)[empty] == 0) and empty.any() == (
        name in ("one row", "nothing")
    )


@pytest.mark.parametrize(
    "name, dtype, allowed",
    [
        ("odd", jnp.float32, FLOAT32),
        ("odd-head", jnp.float32, FLOAT32),
        ("odd-head", jnp.bfloat16, BFLOAT16),
    ],
)
def test_portable_form_equals_reference_on_named_shapes(name, dtype, allowed):
    call = random_inputs(SHAPES[name], dtype=dtype, full=False)
    got, expected = (decode(*call, backend=backend) for backend in ("xla", "reference"))
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    for one, other in zip(got, expected, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=allowed, rtol=allowed)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_a_row_does_not_depend_on_its_batch_mates_bit_for_bit(backend):
    options = {"rows": 3, "new": True, "own": True}
    call = make_call(1, filled=[([40, 1, 63], 63), ([5, 0, 9], 130)], **options)
    mates = make_call(2, filled=[([40, 63, 0], 63), ([5, 130, 130], 130)], **options)
    changed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), call, mates)
    before, after = decode(*call, backend=backend), decode(*changed, backend=backend)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert not np.array_equal(one[1:], other[1:])


def test_filled_beyond_its_block_means_all_and_below_zero_nothing():
    queries, (block,), _ = make_call(3, filled=[([63, 63], 63)])
    clipped, wild = (
        decode(queries, [CacheBlock(block.keys, block.values, np.array(filled))])
        for filled in ([63, 0], [10**6, -4])
    )
    for one, other in zip(clipped, wild, strict=True):
        np.testing.assert_array_equal(one, other)


def test_new_rows_are_causal_among_themselves():
    queries, blocks, (keys, values) = make_call(4, filled=[([20, 0], 63)], rows=4, new=True)
    before, _ = decode(queries, blocks, (keys, values))
    keys, values = (np.concatenate([x[:, :2], 1 - x[:, 2:]], 1) for x in (keys, values))
    after, _ = decode(queries, blocks, (keys, values))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert not np.any(np.all(np.asarray(before[:, 2:] == after[:, 2:]), (0, 2, 3)))


def test_new_entries_may_as_well_lie_in_the_cache():
    queries, (block,), (keys, values) = make_call(5, filled=[([20, 0], 63)], new=True)
    apart = decode(queries, [block], (keys, values))
    rows = np.arange(2), block.filled
    cached = [np.asarray(x).copy() for x in (block.keys, block.values)]
    for cache, own in zip(cached, (keys, values), strict=True):
        cache[rows] = own[:, 0]
    together = decode(queries, [CacheBlock(*cached, block.filled + 1)])
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_allclose(one, other, atol=FLOAT32)


def test_is_range_attention_over_the_filled_ranges():
    call = make_call(6, filled=[([40, 0], 63), ([7, 100], 100)], rows=3, new=True, own=True)
    queries, blocks, new = call
    sources = [
        RangeSource(x.keys, x.values, np.zeros((2, 3), int), np.tile(x.filled, (3, 1)).T, x.queries)
        for x in blocks
    ]
    sources.append(RangeSource(*new, np.zeros((2, 3), int), np.tile([1, 2, 3], (2, 1))))
    expected = range_attention(queries, sources, scale=SCALE, backend="reference")
    for one, other in zip(decode(*call), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=FLOAT32)


def test_scale_is_by_default_that_of_the_head_size():
    call = make_call(7, filled=[([9], 9)], head_dim=25)
    np.testing.assert_array_equal(decode(*call, scale=None)[1], decode(*call, scale=0.2)[1])


def test_a_gradient_is_refused():
    queries, blocks, _ = make_call(8, filled=[([9], 9)])
    with pytest.raises(NotImplementedError, match="range_attention has one"):
        jax.grad(lambda q: decode_attention(q, blocks)[0].sum())(queries)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that looks like one with a Hopper GPU."""
    monkeypatch.setattr(triton, "triton_obstacle", lambda: None)
    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "TESTED_JAX", jax.__version__)


def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def shaped_call(head_dim=64, blocks=1, dtype=jnp.bfloat16):
    entries, filled = like(2, 40, 2, head_dim, dtype=dtype), like(2, dtype=jnp.int32)
    return like(2, 1, 4, head_dim, dtype=dtype), [CacheBlock(entries, entries, filled)] * blocks


def test_every_backend_says_whether_it_is_available():
    reasons = explain(*shaped_call())
    assert reasons["reference"] == reasons["xla"] == "available"
    assert "CUDA" in reasons["triton"]
    assert reasons["auto"].startswith("takes xla: no kernel can serve: triton (it needs a CUDA")
    assert reasons["mosaic"] in reasons["auto"]
    for operation in (decode_attention, execution):
        with pytest.raises(ValueError, match=r"'triton' cannot serve .* CUDA"):
            jax.eval_shape(functools.partial(operation, backend="triton"), *shaped_call())


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, "available"),
        ({"blocks": 3}, "available"),
        ({"blocks": 4}, "up to 3 blocks, not 4"),
        ({"head_dim": 72}, "head_dim 72 is not one of"),
        ({"dtype": jnp.float32}, "bfloat16 or float16 throughout, not float32"),
    ],
)
def test_the_kernel_says_what_it_serves(hopper, options, reason):
    assert reason in explain(*shaped_call(**options))["triton"]


def test_auto_says_why_a_kernel_is_passed_over(hopper, monkeypatch):
    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "TESTED_JAX", jax.__version__)
    monkeypatch.setattr(mosaic, "obstacle", lambda *_: "not here")
    assert explain(*shaped_call())["auto"] == "takes triton"
    monkeypatch.setattr(triton, "TESTED", {(128, "bfloat16")})
    answer = explain(*shaped_call())["auto"]
    assert answer.startswith("takes xla: triton could serve, but the GPU checks do not cover ")
    assert answer.endswith("head_dim 64 in bfloat16 on compute capability 9.0")


def test_the_kernel_needs_one_dtype(hopper):
    queries, blocks = shaped_call()
    new = (like(2, 1, 2, 64, dtype=jnp.float16),) * 2
    assert "bfloat16 and float16" in explain(queries, blocks, new=new)["triton"]


def test_auto_takes_the_kernel_only_for_what_is_tested(hopper, monkeypatch):
    calls = []

    def attend(queries, blocks, new, scale):
        calls.append(scale)
        return queries, queries[..., 0].astype(jnp.float32)

    monkeypatch.setattr(triton, "attend", attend)
    monkeypatch.setattr(triton, "TESTED", {(64, "bfloat16")})
    jax.eval_shape(decode_attention, *shaped_call())
    assert calls == [64**-0.5]
    jax.eval_shape(decode_attention, *shaped_call(blocks=4))
    monkeypatch.setattr(triton, "TESTED", {(128, "bfloat16")})
    jax.eval_shape(decode_attention, *shaped_call())
    monkeypatch.undo()
    jax.eval_shape(decode_attention, *shaped_call())
    assert calls == [64**-0.5]


@pytest.mark.parametrize(
    ("capability", "memory"), [((9, 0), 227), ((8, 0), 163), ((8, 9), 99), ((12, 0), 99)]
)
@pytest.mark.parametrize("head_dim", triton.HEAD_DIMS)
@pytest.mark.parametrize("points", [1, 4, 64, 200])
def test_plans_are_cut_to_what_the_device_has_room_for(
    capability, memory, head_dim, points, monkeypatch
):
    monkeypatch.setattr(gpu, "compute_capability", lambda: capability)
    monkeypatch.setattr(gpu, "shared_memory", lambda: 1024 * memory)
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 2000)
    sizes = Sizes(batch=1, kv_heads=1, points=points, head_dim=head_dim, entries=1 << 20)
    planned = plan(sizes, 2)
    taken = planning.program_memory(sizes, 2, planned.tile_entries, planned.num_stages)
    assert taken <= 1024 * memory
    assert planned.tile_entries >= 16 and planned.num_stages >= 2
    assert planned.splits == MAXIMUM_SPLITS


def test_the_plan_of_hopper_is_assumed_without_a_gpu():
    sizes = Sizes(batch=64, kv_heads=1, points=64, head_dim=256, entries=4096)
    assert plan(sizes, 2) == Plan(tile_entries=64, splits=2, num_warps=8, num_stages=3)
    sizes = Sizes(batch=1, kv_heads=8, points=4, head_dim=128, entries=65536)
    assert plan(sizes, 2) == Plan(tile_entries=64, splits=128, num_warps=4, num_stages=4)


def test_plans_fill_the_chip_and_stay_within_it():
    for batch in (1, 3, 64, 512):
        for kv_heads, points in ((32, 1), (8, 4), (1, 64), (1, 256)):
            for head_dim in (64, 80, 128, 256):
                for entries in (1, 63, 1000, 65536):
                    sizes = Sizes(
                        batch=batch,
                        kv_heads=kv_heads,
                        points=points,
                        head_dim=head_dim,
                        entries=entries,
                    )
                    planned = plan(sizes, itemsize=2)
                    tile = planned.tile_entries
                    assert tile in (16, 32, 64, 128) and 1 <= planned.splits <= MAXIMUM_SPLITS
                    assert tile == 16 or tile < 2 * entries
                    assert (planned.splits - 1) * 2 * tile < entries
                    if entries == 65536:
                        programs = batch * kv_heads * -(-points // query_tile(points))
                        assert programs * planned.splits >= 120


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, b, n: (q[0], b, n), "give .batch, rows, heads, head_dim"),
        (lambda q, b, n: (q, [], n), "at least one block"),
        (lambda q, b, n: (q[:1], b, n), r"blocks\[0\] has keys.*batch is 1"),
        (lambda q, b, n: (q[..., :8], b, n), "head_dim 8"),
        (lambda q, b, n: (q[:, :, :3], b, n), "3 heads do not divide into 2 KV heads"),
        (lambda q, b, n: (q, [CacheBlock(b.keys, b.values[:, 1:], b.filled)], n), r"blocks\[0\]"),
        (lambda q, b, n: (q, [CacheBlock(b.keys[:, :0], b.values[:, :0], b.filled)], n), "no room"),
        (lambda q, b, n: (q, [CacheBlock(b.keys, b.values, b.filled[:1])], n), r"filled.*\(1,\)"),
        (lambda q, b, n: (q, [CacheBlock(b.keys, b.values, b.filled * 1.0)], n), "filled.*float"),
        (lambda q, b, n: (q, [CacheBlock(b.keys, b.values, 9)], n), "filled is a int; give an"),
        (lambda q, b, n: (q, [CacheBlock(b.keys, b.values, b.filled, q[:, :1])], n), "queries has"),
        (lambda q, b, n: (q, b, (n[0][:, :1], n[1][:, :1])), "1 entries for 2 rows"),
        (lambda q, b, n: (q, b, (n[0][:, :, :1], n[1][:, :, :1])), r"KV heads: \[1, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    queries, (block,), new = make_call(9, filled=[([9, 3], 9)], rows=2, new=True)
    queries, blocks, new = change(queries, block, new)
    blocks = [blocks] if isinstance(blocks, CacheBlock) else blocks
    with pytest.raises(ValueError, match=message):
        decode_attention(queries, blocks, new=new)


def test_a_block_alone_is_no_list():
    queries, (block,), _ = make_call(10, filled=[([9], 9)])
    for operation in (decode_attention, explain):
        with pytest.raises(ValueError, match="blocks is a CacheBlock; give a list"):
            operation(queries, block)


def test_unknown_backend():
    queries, blocks, _ = make_call(10, filled=[([9], 9)])
    for operation in (decode_attention, execution):
        with pytest.raises(ValueError, match="'cudnn' is unknown; give auto"):
            operation(queries, blocks, backend="cudnn")


@pytest.mark.parametrize("scale", [0, -0.5, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    queries, blocks, _ = make_call(11, filled=[([9], 9)])
    with pytest.raises(ValueError, match="give a positive number"):
        decode_attention(queries, blocks, scale=scale)
