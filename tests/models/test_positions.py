"""Rotations against products of complex numbers, and the learned table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import documents, hidden, random_model, random_tokens, small_config

from seqeff.checks import ConfigError
from seqeff.models import HeadProjections, LearnedPositions, NoPositions, Rotary


def complex_rotation(x, positions, base, rotated, pairs):
    """x [rows, heads, head_dim], a pair at a time, in complex128."""
    turned = np.array(x, np.float64)
    for pair in range(rotated // 2):
        if pairs == "half":
            real, imaginary = pair, pair + rotated // 2
        else:
            real, imaginary = 2 * pair, 2 * pair + 1
        angle = positions * base ** (-2 * pair / rotated)
        value = (x[..., real] + 1j * x[..., imaginary]) * np.exp(1j * angle)[:, None]
        turned[..., real], turned[..., imaginary] = value.real, value.imag
    return turned


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize(("head_dim", "fraction", "rotated"), [(8, 1.0, 8), (16, 0.25, 4)])
def test_rotation_is_that_of_complex_numbers(pairs, head_dim, fraction, rotated):
    rotary = Rotary(base=500.0, fraction=fraction, pairs=pairs)
    x = np.random.default_rng(0).normal(size=(1, 63, 3, head_dim)).astype(np.float32)
    positions = np.arange(63)[None] + 100
    actual = rotary.rotate(x, rotary.rotation(positions, head_dim))
    expected = complex_rotation(x[0], positions[0], 500.0, rotated, pairs)
    np.testing.assert_allclose(actual[0], expected, atol=2e-5)
    if fraction < 1:
        np.testing.assert_array_equal(actual[..., rotated:], x[..., rotated:])
    assert rotary.rotate(x.astype(jnp.bfloat16), rotary.rotation(positions, head_dim)).dtype == (
        jnp.bfloat16
    )


def test_no_positions_change_nothing():
    assert NoPositions().rotation(jnp.zeros((1, 3), jnp.int32), 8) is None
    assert NoPositions().embedding(8, 0.02, None) is None


def test_learned_positions_are_added_by_index_in_the_document():
    tokens, starts = np.arange(12)[None], documents(12, (0, 5))
    config = small_config(
        positions=LearnedPositions(length=13), layers=1, attention_backend="reference"
    )
    graph, parameters = random_model(config)
    actual = hidden(graph, parameters, tokens, starts)
    table = parameters.pop("position_embedding")
    # every token occurs once, so its position can as well be part of its embedding
    moved = parameters["embedding"].at[tokens[0]].add(table[tokens[0] - starts[0]])
    plain, _ = random_model(dataclasses.replace(config, positions=NoPositions()))
    expected = hidden(plain, parameters | {"embedding": moved}, tokens, starts)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_row_longer_than_the_learned_positions():
    graph, parameters = random_model(small_config(positions=LearnedPositions(length=12)))
    model = nnx.merge(graph, parameters)
    with pytest.raises(ConfigError, match=r"LearnedPositions.length = 12 is below the row's 13"):
        jax.eval_shape(model, random_tokens(1, 13))
    with pytest.raises(ConfigError, match=r"LearnedPositions.length = 12 is below the row's 20"):
        jax.eval_shape(lambda: model.extend(random_tokens(1, 1), model.empty_cache(1, 20)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotary(base=1.0), r"Rotary.base = 1.0 must exceed 1"),
        (lambda: Rotary(fraction=0.0), r"Rotary.fraction = 0.0 must be in \(0, 1\]"),
        (lambda: Rotary(fraction=1.5), r"Rotary.fraction = 1.5 must be in"),
        (lambda: Rotary(pairs="both"), r"Rotary.pairs = 'both' is of type str; give 'half' or"),
        (lambda: LearnedPositions(length=0), r"LearnedPositions.length = 0 must be at least 1"),
        (
            lambda: small_config(positions=Rotary(fraction=0.4)),
            r"Rotary.fraction = 0.4 of a head of 8 is 3 dimensions; an even number is needed",
        ),
        (
            lambda: small_config(projections=HeadProjections(heads=2, head_dim=1)),
            r"Rotary.fraction = 1.0 of a head of 1 is 1 dimensions",
        ),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
