"""The deterministic gradient of the embedding against the scattered one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import quick_jit

from seqeff.models import embedding
from seqeff.models.embedding import embed


# all 63 x 2 tokens in one product; in 9 products of 14; in 13 of 10, the last partly padding
@pytest.mark.parametrize("rows", [8192, 14, 10])
def test_gradients_agree(monkeypatch, rows):
    monkeypatch.setattr(embedding, "_ROWS_PER_MATMUL", rows)
    random = np.random.default_rng(0)
    table = random.normal(size=(11, 8)).astype(np.float32)
    # token 10 never occurs, the others often
    tokens = random.integers(0, 10, (2, 63))
    cotangent = random.normal(size=(2, 63, 8)).astype(np.float32)

    def both(gradient):
        value, pull = jax.vjp(lambda table: embed(table, tokens, jnp.float32, gradient), table)
        return value, pull(cotangent)[0]

    (scattered, scatter), (multiplied, matmul) = quick_jit(
        lambda: (both("scatter"), both("matmul"))
    )()
    np.testing.assert_array_equal(scattered, table[tokens])
    np.testing.assert_array_equal(multiplied, table[tokens])
    expected = np.zeros((11, 8))
    np.add.at(expected, tokens, cotangent.astype(np.float64))
    np.testing.assert_allclose(scatter, expected, atol=1e-5)
    np.testing.assert_allclose(matmul, expected, atol=1e-5)
    assert not np.any(matmul[10])


@pytest.mark.parametrize("gradient", ["scatter", "matmul"])
def test_bfloat16_activations_and_float32_gradients(gradient):
    table, tokens = jnp.ones((4, 2)), jnp.zeros((1, 300), jnp.int32)

    def value(table):
        rows = embed(table, tokens, jnp.bfloat16, gradient)
        assert rows.dtype == jnp.bfloat16
        return rows.astype(jnp.float32).sum()

    total = quick_jit(jax.grad(value))(table)
    assert total.dtype == jnp.float32
    # a sum of 300 ones in bfloat16 would stop at 256
    np.testing.assert_array_equal(total[0], 300)
