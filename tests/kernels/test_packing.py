"""Packing of chosen tokens against numpy's boolean indexing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqeff_kernels import gather, pack


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), density=st.sampled_from([0.0, 0.1, 0.9, 1.0]))
def test_packs_the_chosen_tokens_in_order(seed, density):
    random = np.random.default_rng(seed)
    mask = random.random((3, 63)) < density
    array = random.normal(size=(3, 63, 2, 5)).astype(np.float32)
    packed = jax.jit(pack)(mask)
    entries = gather(jnp.asarray(array), packed)
    assert packed.indices.shape == (3, 63)
    assert np.all((packed.indices >= 0) & (packed.indices < 63))
    np.testing.assert_array_equal(packed.count, np.cumsum(mask, 1))
    for row in range(3):
        np.testing.assert_array_equal(entries[row, : mask[row].sum()], array[row, mask[row]])


@pytest.mark.parametrize("features", [(), (2, 5)])
@pytest.mark.parametrize("capacity", [None, 20])
def test_the_gradient_reaches_each_chosen_token_once(features, capacity):
    random = np.random.default_rng(0)
    mask = np.zeros((2, 63), bool)
    mask[:, random.choice(63, 20, replace=False)] = True
    mask[0, np.flatnonzero(mask[0])[:7]] = False
    array = jnp.asarray(random.normal(size=(2, 63, *features)), jnp.float32)
    packed = pack(jnp.asarray(mask), capacity)
    weight = random.normal(size=(2, packed.indices.shape[1], *features)).astype(np.float32)
    gradient = jax.grad(lambda x: (gather(x, packed) * weight).sum())(array)
    expected = np.zeros(array.shape, np.float32)
    for row in range(2):
        expected[row, mask[row]] = weight[row, : mask[row].sum()]
    np.testing.assert_array_equal(gradient, expected)


def test_the_gradient_needs_no_scatter():
    packed = pack(jnp.ones((2, 63), bool))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: (gather(x, packed) ** 2).sum()))(jnp.ones((2, 63, 4)))
    assert "gather" in str(jaxpr) and "scatter" not in str(jaxpr)


def test_a_row_that_overflows_its_capacity_is_nan_and_no_other():
    mask = jnp.arange(10) < jnp.array([[4], [5]])
    packed = pack(mask, 4)
    entries = gather(jnp.ones((2, 10, 3)), packed)
    np.testing.assert_array_equal(packed.overflows, [False, True])
    assert np.all(entries[0] == 1) and np.all(np.isnan(entries[1]))
