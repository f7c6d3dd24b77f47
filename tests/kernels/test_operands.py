"""Sources as the GPU kernels take them, in their portable form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels.range_attention import RangeSource, TokenSource, gather, pack, range_attention
from seqeff_kernels.range_attention.operands import gathered, operands, token_gradients

ROWS, ENTRIES = 40, 63


@pytest.fixture
def tokens():
    generator = np.random.default_rng(0)
    queries, keys, values = (
        jnp.asarray(generator.normal(size=(2, ROWS, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )
    packed = pack(jnp.asarray(generator.random((2, ROWS)) < 0.3))
    bounds = packed.count * 0, packed.count
    return queries, keys, values, packed, bounds


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_packing_inside_equals_gathering_outside(tokens, backend):
    queries, keys, values, packed, bounds = tokens

    def run(inside):
        def loss(queries, keys, values):
            if inside:
                far = RangeSource(keys, values, *bounds, packed=packed)
            else:
                far = RangeSource(gather(keys, packed), gather(values, packed), *bounds)
            sources = [far, TokenSource(keys, values, window=5)]
            output, logsumexp = range_attention(queries, sources, backend=backend)
            return (output**2).sum() + logsumexp.sum()

        return jax.value_and_grad(loss, (0, 1, 2))(queries, keys, values)

    for one, other in zip(jax.tree.leaves(run(True)), jax.tree.leaves(run(False)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_packed_arrays_are_checked(tokens):
    queries, keys, values, packed, bounds = tokens
    wrong = packed._replace(count=packed.count[:, :-1])
    with pytest.raises(ValueError, match=r"sources\[0\].packed.count has shape"):
        range_attention(queries, [RangeSource(keys, values, *bounds, packed=wrong)])


def test_a_packed_source_shares_the_tokens_of_another(tokens):
    queries, keys, values, packed, bounds = tokens
    far = RangeSource(keys, values, *bounds, packed=packed)
    made, static = operands(queries, (far, TokenSource(keys, values, window=5)))
    assert made[0].keys is None and static[0].tokens == 1 and static[1].tokens == 1
    # other arrays of the same numbers are not the same arrays
    made, static = operands(queries, (far, TokenSource(keys + 0, values, window=5)))
    assert made[0].keys is keys and static[0].tokens == 0


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_packed_entries_reach_their_tokens(tokens, shared):
    queries, keys, values, packed, bounds = tokens
    near = TokenSource(keys if shared else keys + 0, values, window=5)
    made, static = operands(queries, (RangeSource(keys, values, *bounds, packed=packed), near))
    generator = np.random.default_rng(1)
    gradients = [
        tuple(jnp.asarray(generator.normal(size=x.shape), x.dtype) for x in (s.keys, s.values))
        for s in gathered(made, static)
    ]
    found = token_gradients(made, static, gradients)
    for index in range(2):
        alone = np.zeros(keys.shape, np.float32)
        for row in range(2):
            chosen = np.flatnonzero(np.diff(packed.count[row], prepend=0))
            alone[row, chosen] = gradients[0][index][row, : len(chosen)]
        if shared:
            assert found[0] == (None, None)
            np.testing.assert_allclose(found[1][index], gradients[1][index] + alone, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found[0][index], alone)
            np.testing.assert_array_equal(found[1][index], gradients[1][index])


@pytest.mark.parametrize("lines", [(2, ROWS), (2, 2, ROWS)])
def test_entries_in_no_range_are_cleared_and_no_other(tokens, lines):
    queries = tokens[0]
    generator = np.random.default_rng(2)
    start, end = np.sort(generator.integers(0, ENTRIES, (2, *lines)), axis=-1)
    entry = np.arange(ENTRIES)[:, None]
    attended = ((start[..., None, :] <= entry) & (entry < end[..., None, :])).any(-1)
    attended = attended.swapaxes(1, 2) if len(lines) == 3 else attended[..., None]
    assert attended.any() and not attended.all()
    keys = jnp.asarray(generator.normal(size=(2, ENTRIES, 2, 8)), jnp.float32)
    poisoned = jnp.where(attended[..., None], keys, jnp.nan)
    source = RangeSource(poisoned, poisoned, jnp.asarray(start), jnp.asarray(end))
    (cleared,) = gathered(*operands(queries, (source,)), finite=True)
    np.testing.assert_array_equal(cleared.keys, np.where(attended[..., None], keys, 0))
    np.testing.assert_array_equal(cleared.values, cleared.keys)


def test_packed_padding_is_cleared(tokens):
    queries, keys, values, packed, bounds = tokens
    # the first token is what fills the padding of the indices
    keys = keys.at[:, 0].set(jnp.nan)
    chosen = jnp.diff(packed.count, axis=1, prepend=0) > 0
    packed = pack(chosen.at[:, 0].set(False))
    source = RangeSource(keys, values, *bounds, packed=packed)
    (listed,) = gathered(*operands(queries, (source,)), finite=True)
    assert np.isfinite(listed.keys).all()
