"""The Triton kernels, interpreted on the CPU, against decode_attention's reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter

from seqeff_kernels import gpu
from seqeff_kernels.decode_attention import CacheBlock, decode_attention, merge, triton
from seqeff_kernels.decode_attention.plan import Plan
from seqeff_kernels.decode_attention.shapes import SHAPES, Shape, inputs

pytestmark = pytest.mark.parity

random_inputs = jax.jit(inputs, static_argnames=("shape", "dtype", "full"))

TOLERANCE = {jnp.float32: 1e-5, jnp.float16: 2e-3}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for module in (gpu, triton):
        monkeypatch.setattr(module, "triton_call", triton_interpreter.triton_call)
        monkeypatch.setattr(module, "triton_obstacle", lambda: None)
    monkeypatch.setattr(triton, "DTYPES", ("float32", "float16"))


@pytest.fixture
def use_plan(monkeypatch):
    def use(**sizes):
        chosen = Plan(**{"tile_entries": 16, "splits": 1, "num_warps": 4, "num_stages": 3} | sizes)
        monkeypatch.setattr(triton, "plan", lambda *_: chosen)

    return use


def poisoned(shape, seed=0, dtype=jnp.float32, own=False):
    """Blocks filled to random lengths, of which row 0 has none and the last row all; NaN beyond."""
    queries, blocks, new = random_inputs(shape, seed, dtype, full=False)
    made = []
    for block in blocks:
        capacity = block.keys.shape[1]
        filled = block.filled.at[0].set(0).at[-1].set(capacity)
        beyond = (jnp.arange(capacity) >= filled[:, None])[..., None, None]
        keys, values = (jnp.where(beyond, jnp.nan, x) for x in (block.keys, block.values))
        brings = queries[:, ::-1] * 0.5 if own and not made else None
        made.append(CacheBlock(keys, values, filled, brings))
    return queries, made, new


def assert_equal_to_reference(queries, blocks, new=None):
    got, expected = (
        decode_attention(queries, blocks, new=new, scale=0.2, backend=backend)
        for backend in ("triton", "reference")
    )
    allowed = TOLERANCE[queries.dtype.type]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=allowed, rtol=allowed)
    return got


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("name", ["odd", "odd-head"])
def test_blocks_splits_and_new_rows(use_plan, name, splits, dtype):
    use_plan(splits=splits, tile_entries=64 if name == "odd" else 16)
    assert_equal_to_reference(*poisoned(SHAPES[name], splits, dtype, own=True))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(batch=3, capacities=(63,), heads=4, kv_heads=4, head_dim=64),
        Shape(batch=2, capacities=(40,), heads=6, kv_heads=2, head_dim=96, rows=2),
        Shape(batch=2, capacities=(70,), heads=64, kv_heads=1, head_dim=256),
        Shape(batch=2, capacities=(20,), heads=40, kv_heads=1, head_dim=64, rows=3, new=True),
        Shape(batch=2, capacities=(5, 130), heads=2, kv_heads=1, head_dim=128, rows=37, new=True),
    ],
)
def test_its_own_plan(shape):
    assert_equal_to_reference(*poisoned(shape))


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_attend_nothing(use_plan, splits):
    use_plan(splits=splits)
    shape = Shape(batch=2, capacities=(7, 90), heads=4, kv_heads=2, head_dim=64)
    output, logsumexp = assert_equal_to_reference(*poisoned(shape))
    assert np.all(output[0] == 0) and np.all(np.isneginf(logsumexp[0]))
    assert np.all(np.isfinite(logsumexp[1]))


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_does_not_depend_on_its_batch_mates_bit_for_bit(use_plan, splits):
    use_plan(splits=splits)
    shape = Shape(batch=3, capacities=(63, 30), heads=4, kv_heads=2, head_dim=64, rows=2, new=True)
    call, mates = poisoned(shape, 1), poisoned(shape, 2)
    # row 1 is of random lengths, and its mates have none and all
    changed = jax.tree.map(lambda a, b: jnp.stack([b[2], a[1], b[0]]), call, mates)
    for one, other in zip(
        assert_equal_to_reference(*call), assert_equal_to_reference(*changed), strict=True
    ):
        np.testing.assert_array_equal(one[1], other[1])
        assert not np.array_equal(one[0], other[0])


def test_inside_jit(use_plan):
    use_plan(splits=2)
    shape = Shape(batch=2, capacities=(33,), heads=4, kv_heads=2, head_dim=64)
    queries, blocks, _ = poisoned(shape)
    decode = jax.jit(decode_attention, static_argnames="backend")
    got, expected = (decode(queries, blocks, backend=b) for b in ("triton", "reference"))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


def test_merging_equals_the_portable_form():
    generator = np.random.default_rng(0)
    output = generator.normal(size=(2, 3, 5, 80)).astype(np.float32)
    logsumexp = generator.normal(size=(2, 3, 5)).astype(np.float32)
    logsumexp[0, 1] = logsumexp[1, :, 2] = -np.inf
    output[0, 1] = np.nan
    arguments = jnp.asarray(output), jnp.asarray(logsumexp), jnp.float32
    pairs = zip(merge.merge(*arguments), merge.merge_portably(*arguments), strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, atol=1e-6)
