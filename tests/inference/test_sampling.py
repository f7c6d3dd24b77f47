"""What may be drawn, and how often, against a plain reading of each setting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from seqeff.checks import ConfigError
from seqeff.inference.sampling import WAYS, Sampling, Settings, draw

SIZE = 40
PLAIN = Sampling(temperature=1.0, top_k=None)
LOGITS = np.random.default_rng(0).normal(size=SIZE).astype(np.float32) * 2


def distribution(logits, sampling, seen=()):
    """The probabilities that a sampling gives each token: filters one after another, in float64."""
    logits = np.asarray(logits, np.float64).copy()
    for token in seen:
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    logits /= sampling.temperature
    order = np.argsort(-logits, kind="stable")
    kept = list(order[: sampling.top_k])
    if sampling.top_p is not None:
        chances = np.exp(logits[kept] - logits[order[0]])
        before = np.cumsum(chances / chances.sum()) - chances / chances.sum()
        kept = [t for t, b in zip(kept, before, strict=True) if b < sampling.top_p]
    if sampling.min_p is not None:
        kept = [t for t in kept if np.exp(logits[t] - logits[order[0]]) >= sampling.min_p]
    chances = np.zeros(len(logits))
    chances[kept] = np.exp(logits[kept] - logits[order[0]])
    return chances / chances.sum()


def draws(logits, sampling, count, seen=(), way=None):
    """Tokens of the seeds 0, 1, and so on."""
    rows = [dataclasses.replace(sampling, seed=seed) for seed in range(count)]
    mask = np.zeros((count, len(logits)), bool)
    mask[:, list(seen)] = True
    tokens, _ = jax.jit(draw, static_argnums=4)(
        jnp.broadcast_to(logits, (count, len(logits))),
        Settings.of(rows),
        jnp.zeros(count, jnp.int32),
        mask,
        way or sampling.way,
    )
    return np.asarray(tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 1.4},
        {"repetition_penalty": 3.0},
        {"repetition_penalty": 0.5, "top_k": 7},
    ],
)
def test_draws_follow_the_distribution(changes):
    sampling = dataclasses.replace(PLAIN, **changes)
    seen = np.argsort(-LOGITS)[[0, 2, 30]]
    count = 4000
    expected = distribution(LOGITS, sampling, seen if sampling.repetition_penalty != 1 else ())
    found = np.bincount(draws(LOGITS, sampling, count, seen), minlength=SIZE) / count
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / count))


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    top_k=st.none() | st.integers(1, 2 * SIZE),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    temperature=st.floats(0.1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_drawn_that_is_filtered_out(top_k, top_p, min_p, temperature, seed):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32) * 3
    expected = distribution(logits, sampling)
    found = draws(logits, sampling, 50, way="filtered")
    assert set(found) <= set(np.flatnonzero(expected)), expected


def test_each_way_gives_what_the_others_give():
    """A row is drawn alike whatever its mates need."""
    for sampling in (PLAIN, dataclasses.replace(PLAIN, temperature=0.0)):
        able = WAYS[WAYS.index(sampling.way) :]
        first, *others = (draws(LOGITS, sampling, 200, way=way) for way in able)
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_rows_have_settings_of_their_own():
    rows = [
        dataclasses.replace(PLAIN, temperature=0.0),
        dataclasses.replace(PLAIN, top_k=2, seed=3),
        dataclasses.replace(PLAIN, top_p=0.3, seed=4),
        dataclasses.replace(PLAIN, seed=5),
    ]
    logits = np.random.default_rng(1).normal(size=(4, SIZE)).astype(np.float32)
    seen, places = np.zeros((4, SIZE), bool), np.arange(4, dtype=np.int32)
    together, _ = draw(logits, Settings.of(rows), places, seen, "filtered")
    for row, sampling in enumerate(rows):
        one = slice(row, row + 1)
        alone, _ = draw(logits[one], Settings.of([sampling]), places[one], seen[one], sampling.way)
        assert alone[0] == together[row]


def test_the_likeliest_are_drawn_with_all_that_are_as_likely():
    logits = np.array([1.0, 3.0, 3.0, 3.0, 0.0], np.float32)
    assert set(draws(logits, dataclasses.replace(PLAIN, top_k=2), 200)) == {1, 2, 3}


def test_log_probabilities_are_the_models_own():
    sampling = dataclasses.replace(PLAIN, temperature=0.3, top_k=2, repetition_penalty=2.0)
    seen = np.ones((1, SIZE), bool)
    token, found = draw(LOGITS[None], Settings.of([sampling]), jnp.zeros(1, int), seen, "filtered")
    expected = LOGITS - np.log(np.exp(LOGITS).sum())
    np.testing.assert_allclose(found[0], expected[token[0]], rtol=1e-5)


def test_further_draws_of_a_seed_differ():
    count = 20
    rows = [PLAIN] * count
    seen = np.zeros((count, SIZE), bool)
    tokens, _ = draw(
        jnp.zeros((count, SIZE)), Settings.of(rows), jnp.arange(count), seen, "sampled"
    )
    assert len(set(np.asarray(tokens).tolist())) > count // 3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"seed": 2**63},
        {"seed": -1},
    ],
)
def test_sampling_that_cannot_be(values):
    with pytest.raises(ConfigError, match=f"Sampling.{next(iter(values))}"):
        Sampling(**values)
