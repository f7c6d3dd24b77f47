import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqeff.checks import ConfigError
from seqeff.training.schedules import Constant, Cosine, Linear, Schedule, WarmupStableDecay


def values(schedule: Schedule, steps: int, peak: float = 1.0) -> np.ndarray:
    """At steps 0 ... steps, the last of which is not run."""
    return np.asarray(jax.vmap(schedule.make(peak, steps))(np.arange(64)))[: steps + 1]


def test_constant() -> None:
    np.testing.assert_allclose(values(Constant(warmup=3), 6, 2.0), [0.5, 1, 1.5, 2, 2, 2, 2])


def test_linear() -> None:
    expected = [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(values(Linear(warmup=2, final_fraction=0.2), 6), expected, rtol=1e-6)


def test_cosine() -> None:
    expected = [0.5, *(0.1 + 0.45 * (1 + math.cos(math.pi * t / 4)) for t in range(5))]
    np.testing.assert_allclose(values(Cosine(warmup=1, final_fraction=0.1), 5), expected, rtol=1e-6)


def test_warmup_stable_decay() -> None:
    schedule = WarmupStableDecay(warmup=1, decay=4, final_fraction=0.2)
    expected = [0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(values(schedule, 8), expected, rtol=1e-6)


def test_fractions_are_of_the_run() -> None:
    fractions = WarmupStableDecay(warmup=0.1, decay=0.25)
    np.testing.assert_array_equal(
        values(fractions, 40), values(WarmupStableDecay(warmup=4, decay=10), 40)
    )


def test_a_zero_as_a_fraction_is_no_warmup() -> None:
    assert values(Cosine(warmup=0.0), 10)[0] == 1.0


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 63),
    warmup=st.integers(0, 63),
    final_fraction=st.floats(0, 1),
    kind=st.sampled_from([Linear, Cosine, WarmupStableDecay]),
)
def test_every_step_learns_and_the_ends_are_exact(
    steps: int, warmup: int, final_fraction: float, kind: type
) -> None:
    warmup = min(warmup, steps - 1)
    extra = {"decay": steps - warmup} if kind is WarmupStableDecay else {}
    rates = values(kind(warmup=warmup, final_fraction=final_fraction, **extra), steps, 3e-4)
    assert np.all(rates[:steps] > 0)
    np.testing.assert_allclose(rates[warmup], 3e-4, rtol=1e-6)
    np.testing.assert_allclose(rates[steps], 3e-4 * final_fraction, rtol=1e-5, atol=1e-12)
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    assert np.all(np.diff(rates[warmup:]) <= 1e-11)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match=r"Cosine.warmup = 1.5 is a fraction"):
        Cosine(warmup=1.5)
    with pytest.raises(ConfigError, match=r"Linear.warmup = -1"):
        Linear(warmup=-1)
    with pytest.raises(ConfigError, match=r"Cosine.final_fraction = 2"):
        Cosine(final_fraction=2.0)
    with pytest.raises(ConfigError, match=r"Cosine.warmup = 20 steps exceeds the run's 10 steps"):
        Cosine(warmup=20).make(1.0, 10)
    with pytest.raises(ConfigError, match=r"exceed the run's 10 steps"):
        WarmupStableDecay(warmup=6, decay=6).make(1.0, 10)
