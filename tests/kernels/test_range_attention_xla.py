"""The portable form against the reference, forward and backward, and what it promises beyond."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqeff_kernels import RangeSource, TokenSource, cost, range_attention
from seqeff_kernels.range_attention import xla
from seqeff_kernels.range_attention.shapes import SHAPES, separator_sources, tokens

# the two sum in different orders; gradients sum over rows and are larger
FLOAT32 = {"output": 1e-5, "gradient": 1e-4}
# weights are rounded to 8 bits before the second product, gradients of scores before the third
BFLOAT16 = {"output": 2e-2, "gradient": 1e-1}

# compiling costs more than running here
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(quick_jit, static_argnames="backend")
def outputs_and_gradients(queries, sources, backend):
    """Of a loss through both outputs, with a gradient that differs from row to row."""

    def loss(queries, arrays):
        replaced = [
            RangeSource(*pair, s.start, s.end, own)
            for s, (*pair, own) in zip(sources, arrays, strict=True)
        ]
        output, logsumexp = range_attention(queries, replaced, backend=backend)
        wave = jnp.sin(jnp.arange(output.size)).reshape(output.shape)
        finite = jnp.where(jnp.isfinite(logsumexp), logsumexp, 0)
        return (output * wave).sum() + (finite * wave[..., 0]).sum(), (output, logsumexp)

    arrays = [(s.keys, s.values, s.queries) for s in sources]
    gradients, outputs = jax.grad(loss, (0, 1), has_aux=True)(queries, arrays)
    return outputs, gradients


def assert_equal_to_reference(queries, sources, tolerance):
    queries, sources = jax.tree.map(jnp.asarray, (queries, sources))
    outputs, gradients = outputs_and_gradients(queries, sources, "xla")
    expected_outputs, expected_gradients = outputs_and_gradients(queries, sources, "reference")
    for got, expected, allowed in (
        (outputs, expected_outputs, tolerance["output"]),
        (gradients, expected_gradients, tolerance["gradient"]),
    ):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        for one, other in pairs:
            one, other = (np.asarray(x, np.float32) for x in (one, other))
            np.testing.assert_allclose(one, other, atol=allowed, rtol=allowed)


@pytest.mark.parametrize(
    "rows, entries, kv_heads, options",
    [
        (1, (1,), 1, {}),
        (1, (1000,), 4, {"per_kv_head": True}),
        (63, (63,), 2, {}),
        (65, (3, 65), 1, {"own_queries": True}),
        (200, (150, 1, 200), 4, {"own_queries": True, "per_kv_head": True}),
        (1000, (130, 1000), 2, {}),
    ],
)
def test_equals_reference(call, rows, entries, kv_heads, options):
    queries, sources = call(
        rows, rows=rows, entries=entries, kv_heads=kv_heads, poison=True, **options
    )
    assert_equal_to_reference(queries, sources, FLOAT32)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_equals_reference_for_any_monotone_bounds(call, seed):
    queries, sources = call(
        seed, rows=130, entries=(70, 129), per_kv_head=True, own_queries=True, poison=True
    )
    assert_equal_to_reference(queries, sources, FLOAT32)


def test_bfloat16(call):
    queries, sources = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x,
        call(0, rows=200, entries=(100, 200)),
    )
    assert_equal_to_reference(queries, sources, BFLOAT16)
    (output, logsumexp), _ = outputs_and_gradients(queries, sources, "xla")
    assert output.dtype == jnp.bfloat16 and logsumexp.dtype == jnp.float32


@pytest.mark.parametrize("name, documents", [("odd", True), ("multi-query", False)])
def test_separator_attention(name, documents):
    shape = SHAPES[name]
    queries, keys, values, chosen = tokens(shape)
    starts = jnp.arange(shape.length) // 50 * 50 * jnp.ones((shape.batch, 1), jnp.int32)

    @functools.partial(quick_jit, static_argnums=3)
    def run(queries, keys, values, backend):
        def loss(*arrays):
            sources = separator_sources(
                *arrays[1:], chosen, shape.window, starts if documents else None
            )
            output, logsumexp = range_attention(arrays[0], sources, backend=backend)
            return (output * jnp.cos(logsumexp)[..., None]).sum(), output

        return jax.grad(loss, (0, 1, 2), has_aux=True)(queries, keys, values)

    gradients, output = run(queries, keys, values, "xla")
    expected_gradients, expected = run(queries, keys, values, "reference")
    np.testing.assert_allclose(output, expected, atol=FLOAT32["output"])
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=FLOAT32["gradient"])


def test_a_row_does_not_depend_on_its_batch_mates_bit_for_bit(call):
    queries, sources = call(4, batch=3, rows=200, entries=(150, 200))
    other_queries, other_sources = call(5, batch=3, rows=200, entries=(150, 200))

    def mixed(ours, theirs):
        return np.concatenate([ours[:1], theirs[1:]])

    changed = jax.tree.map(mixed, (queries, sources), (other_queries, other_sources))
    outputs = outputs_and_gradients(queries, sources, "xla")
    changed = outputs_and_gradients(*changed, "xla")
    for before, after in zip(jax.tree.leaves(outputs), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(before[0], after[0])
        assert not np.array_equal(before[1], after[1])


def test_nothing_depends_on_later_tokens():
    shape = SHAPES["odd"]
    queries, keys, values, chosen = tokens(shape)
    later = jnp.arange(shape.length)[:, None, None] >= 500

    @jax.jit
    def output(queries, keys, values):
        return range_attention(queries, separator_sources(keys, values, chosen, shape.window))[0]

    before = output(queries, keys, values)
    after = output(*(jnp.where(later, 1 - x, x) for x in (queries, keys, values)))
    np.testing.assert_array_equal(before[:, :500], after[:, :500])
    assert not np.array_equal(before[:, 500:], after[:, 500:])


def test_finite_entries_are_attended_alike_where_they_are_vouched_for():
    shape = (1, 70, 2, 8)
    queries, keys, values = (
        jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)
    )
    end = jnp.arange(70)[None] // 2

    def loss(arrays, finite):
        sources = [
            TokenSource(*arrays[1:], window=7, row_offset=-5, finite=finite),
            RangeSource(*arrays[1:], jnp.zeros_like(end), end, finite=finite),
        ]
        return jnp.sin(range_attention(arrays[0], sources, backend="xla")[0]).sum()

    both = [jax.value_and_grad(loss)((queries, keys, values), finite) for finite in (True, False)]
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(one, other)


def test_runs_inside_scan_and_checkpoint():
    shape = SHAPES["multi-query"]
    queries, keys, values, chosen = tokens(shape)

    def layer(x, backend):
        sources = separator_sources(keys + x.mean(2, keepdims=True), values, chosen, shape.window)
        return x + range_attention(x, sources, backend=backend)[0]

    def loss(x, backend, wrap):
        step = wrap(functools.partial(layer, backend=backend))
        return (jax.lax.scan(lambda x, _: (step(x), None), x, length=3)[0] ** 2).sum()

    gradient = quick_jit(jax.grad(loss), static_argnums=(1, 2))
    expected = gradient(queries, "reference", lambda f: f)
    for wrap in (lambda f: f, jax.checkpoint):
        np.testing.assert_allclose(
            gradient(queries, "xla", wrap), expected, atol=FLOAT32["gradient"], rtol=1e-4
        )


def test_nothing_of_size_length_squared_exists():
    length = 4096
    like = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

    def loss(queries, keys, values, chosen):
        output, logsumexp = range_attention(
            queries, separator_sources(keys, values, chosen, 64), backend="xla"
        )
        return output.sum() + logsumexp.sum()

    chosen = jax.ShapeDtypeStruct((1, length), jnp.bool)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(like, like, like, chosen).compile()
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"(?:f32|s32|pred|bf16)\[([\d,]+)\]", compiled.as_text())
    ]
    assert len(sizes) > 100
    assert max(sizes) < length**2 / 64
    assert compiled.memory_analysis().temp_size_in_bytes < length**2 / 4


def test_visits_the_tiles_that_the_cost_counts(call, monkeypatch):
    visited = []

    def counted(visit):
        def count_and_visit(*arguments):
            jax.debug.callback(lambda index: visited.append(int(index)), arguments[-2])
            return visit(*arguments)

        return count_and_visit

    for name in ("_visit", "_visit_backward"):
        monkeypatch.setattr(xla, name, counted(getattr(xla, name)))
    queries, sources = call(8, rows=200, entries=(150, 700))
    expected = 0
    for source in sources:
        rows, entries = xla.tile_sizes(200, source.keys.shape[1])
        tiles = cost(
            queries, [source], tile_rows=rows, tile_entries=entries, batch_shares_tiles=True
        ).tiles
        expected += tiles // (queries.shape[0] * queries.shape[2])
    assert expected < 4 * (3 + 11)  # not all
    gradient = jax.grad(lambda q: range_attention(q, sources, backend="xla")[0].sum())
    jax.block_until_ready(gradient(jnp.asarray(queries)))
    jax.effects_barrier()
    assert len(visited) == 2 * expected


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from seqeff_kernels import range_attention
from seqeff_kernels.range_attention.shapes import Shape, separator_sources, tokens

shape = Shape(batch=4, length=150, heads=8, kv_heads=4, head_dim=8)
*arrays, chosen = tokens(shape)
starts = jnp.arange(150) // 40 * 40 * jnp.ones((4, 1), jnp.int32)

def loss(queries, keys, values, chosen, starts):
    sources = separator_sources(keys, values, chosen, 30, starts)
    output, logsumexp = range_attention(queries, sources, backend="xla")
    return (output ** 2).sum() + logsumexp.sum(), output

run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
expected = run(*arrays, chosen, starts)
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
heads = NamedSharding(mesh, P("data", None, "tensor"))
rows = NamedSharding(mesh, P("data"))
sharded = run(*jax.device_put(arrays, heads), *jax.device_put((chosen, starts), rows))
for got, wanted in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected)):
    np.testing.assert_allclose(got, wanted, atol=1e-5)
assert len(sharded[1].sharding.device_set) == 8, sharded[1].sharding
print("agree", sharded[1].sharding.spec)
"""


def test_sharded_inputs_give_the_same():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "agree" in done.stdout


def test_one_row_of_decoding_equals_its_row_of_the_whole():
    shape = SHAPES["multi-query"]
    queries, keys, values, _ = tokens(shape)
    whole, _ = range_attention(queries, [TokenSource(keys, values, window=9)], backend="xla")
    position = jnp.array([62, 5, 0])
    unfilled = jnp.arange(63)[:, None, None] > position[:, None, None, None]
    keys, values = (jnp.where(unfilled, jnp.nan, x) for x in (keys, values))
    row = jnp.take_along_axis(queries, position[:, None, None, None], 1)
    one, _ = range_attention(
        row, [TokenSource(keys, values, window=9, row_offset=position)], backend="xla"
    )
    expected = jnp.take_along_axis(whole, position[:, None, None, None], 1)
    np.testing.assert_allclose(one, expected, atol=FLOAT32["output"])
