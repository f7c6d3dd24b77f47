"""Rotations against products of complex numbers, and the learned table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import documents, hidden, random_model, random_tokens, small_config

from seqeff.checks import ConfigError
from seqeff.models import (
    BilevelPositions,
    HeadProjections,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    NoPositions,
    Rotary,
    YarnScaling,
    empty_cache,
)


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


def test_linear_scaling_is_interpolation():
    at = np.arange(0, 63, 3)[None]
    scaled = Rotary(scaling=LinearScaling(factor=3.0)).rotation(at, 8)
    for actual, expected in zip(scaled, Rotary().rotation(at // 3, 8), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_scaling_of_llama_3_leaves_fast_pairs_alone_and_slows_slow_ones():
    scaling = Llama3Scaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=100
    )
    # in 100 tokens: 0.5 and 1 turns are slow, 4 and 10 fast, 2.5 half way between
    turns = np.array([0.005, 0.01, 0.025, 0.04, 0.1])
    expected = [0.005 / 8, 0.01 / 8, (0.025 / 8 + 0.025) / 2, 0.04, 0.1]
    np.testing.assert_allclose(scaling.scale(turns), expected)


def test_yarn_slows_the_last_pairs_and_stretches_once():
    scaling = YarnScaling(factor=4.0, original_length=1000, fast=100.0, slow=10.0)
    # in 1000 tokens these make 400, 200, 100, 50, 25, 12.5 and 6.25 turns: the ramp is from the
    # pair of 100 to the one after that of 12.5
    turns = 0.4 * 0.5 ** np.arange(7)
    slowed = np.array([0, 0, 0, 1 / 4, 2 / 4, 3 / 4, 1])
    np.testing.assert_allclose(scaling.scale(turns), turns * (1 - slowed) + turns / 4 * slowed)
    rotary = Rotary(scaling=scaling)
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
    first, second = np.array([[3, 70, 400, 9, 0]]), np.array([[-3, 5, -390, 0, 7]])
    once = rotary.rotate(x, rotary.rotation(first, 8))
    lengths = np.linalg.norm(once, axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(lengths, 1 + np.log(4) / 10, rtol=1e-5)
    np.testing.assert_allclose(
        rotary.rotate(once, rotary.rotation(second, 8, further=True)),
        rotary.rotate(x, rotary.rotation(first + second, 8)),
        atol=1e-5,
    )


def test_angles_of_large_positions_are_exact():
    """Float32 products would be off by a quarter of a radian at four million."""
    positions = np.array([[0, 1, 4095, 1_000_003, 4_194_303, 2**31 - 1, -1, -4_194_303]])
    rotation = Rotary().rotation(positions, 16)
    angles = positions[0][:, None] * 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(rotation.cosine[0, :, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(rotation.sine[0, :, 0], np.sin(angles), atol=1e-6)


def test_rotations_add_up():
    rotary = Rotary()
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
    first, second = np.array([[3, 70, 4_000_000, 9, 0]]), np.array([[-3, 5, -3_999_990, 0, 7]])

    def rotate(x, by):
        return rotary.rotate(x, rotary.rotation(by, 8))

    np.testing.assert_allclose(
        rotate(rotate(x, first), second), rotate(x, first + second), atol=3e-6
    )


def naive_segments(tokens, starts, separators):
    """Separators before each token of its document, and tokens since the last of them."""
    before, since = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, token in np.ndindex(tokens.shape):
        first = starts[row, token]
        earlier = [t for t in range(first, token) if tokens[row, t] in separators]
        before[row, token] = len(earlier)
        since[row, token] = token - (max(earlier) + 1 if earlier else first)
    return before, since


def test_segments_are_counted_from_their_separators():
    positions = BilevelPositions(separator_ids=(1, 2), segment_length=4)
    tokens = np.random.default_rng(0).integers(0, 6, (3, 40)).astype(np.int32)
    starts = documents(40, (0, 7, 8, 30), (0,), (0, 39))
    before, since = naive_segments(tokens, starts, (1, 2))
    located, carried = positions.locate(
        tokens, np.arange(40) - starts, positions.carry(3), jnp.asarray([40, 40, 17])
    )
    np.testing.assert_array_equal(located.rotated, before)
    np.testing.assert_array_equal(located.embedded, np.minimum(since, 3))
    # what the next token would have
    assert int(carried.separators[1]) == before[1, -1] + (tokens[1, -1] in (1, 2))
    assert int(carried.separators[2]) == before[2, 17]
    assert int(carried.since[2]) == since[2, 17]
    # the rest of a row follows
    rest, _ = positions.locate(
        tokens[2:, 17:39], np.arange(17, 39)[None], jax.tree.map(lambda x: x[2:], carried), None
    )
    np.testing.assert_array_equal(rest.rotated, before[2:, 17:39])
    np.testing.assert_array_equal(rest.embedded, np.minimum(since, 3)[2:, 17:39])


def test_bad_segments():
    with pytest.raises(ConfigError, match=r"BilevelPositions\.segment_length = 0 must be at least"):
        BilevelPositions(segment_length=0)
    with pytest.raises(ConfigError, match=r"BilevelPositions\.preset = 'opt' is not one of pythia"):
        BilevelPositions(preset="opt")
    with pytest.raises(ConfigError, match=r"BilevelPositions\.fraction = 2.0 must be in"):
        BilevelPositions(fraction=2.0)
    found = BilevelPositions(characters=".").for_vocabulary(["a", ".", "b."])
    assert found.separator_ids == (1, 2)


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
    config = small_config(positions=LearnedPositions(length=12))
    model = nnx.merge(*random_model(config))
    with pytest.raises(ConfigError, match=r"LearnedPositions.length = 12 is below the row's 13"):
        jax.eval_shape(model, random_tokens(1, 13))
    with pytest.raises(ConfigError, match=r"LearnedPositions.length = 12 is below the row's 20"):
        empty_cache(config, 1, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotary(base=1.0), r"Rotary.base = 1.0 must exceed 1"),
        (lambda: Rotary(fraction=0.0), r"Rotary.fraction = 0.0 must be in \(0, 1\]"),
        (lambda: Rotary(fraction=1.5), r"Rotary.fraction = 1.5 must be in"),
        (lambda: Rotary(pairs="both"), r"Rotary.pairs = 'both' is of type str; give 'half' or"),
        (lambda: LinearScaling(factor=0.0), r"LinearScaling.factor = 0.0 must be positive"),
        (
            lambda: Llama3Scaling(
                factor=8.0,
                low_frequency_factor=4.0,
                high_frequency_factor=4.0,
                original_length=100,
            ),
            r"Llama3Scaling.low_frequency_factor = 4.0 must be positive and below",
        ),
        (
            lambda: YarnScaling(factor=0.5, original_length=9),
            r"YarnScaling.factor = 0.5 must be at least 1",
        ),
        (
            lambda: YarnScaling(factor=2.0, original_length=9, slow=33.0),
            r"YarnScaling.slow = 33.0 must be positive and below fast = 32.0",
        ),
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
