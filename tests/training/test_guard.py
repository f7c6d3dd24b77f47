import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff.checks import ConfigError, UserError
from seqeff.training.guard import Guard


def run(guard: Guard, losses: list[float], norms: list[float] | None = None) -> tuple[list, dict]:
    state, accepted = guard.init(), []
    judge = jax.jit(guard.judge)
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        accept, state = judge(state, jnp.float32(loss), jnp.float32(norm))
        accepted.append(bool(accept))
    return accepted, state


def naive(guard: Guard, losses: list[float]) -> list[bool]:
    kept: list[float] = []
    decisions = []
    for loss in losses:
        accept = bool(np.isfinite(loss))
        if accept and len(kept) >= guard.window and guard.spike_factor is not None:
            last = kept[-guard.window :]
            deviation = max(np.std(last), 0.01 * abs(np.mean(last)))
            bound = np.mean(last) + guard.spike_factor * deviation
            accept = loss <= bound
            loss = min(loss, bound)
        if np.isfinite(loss):
            kept.append(loss)
        decisions.append(bool(accept))
    return decisions


def test_against_a_naive_one() -> None:
    generator = np.random.default_rng(0)
    losses = 4 - np.linspace(0, 2, 63) + 0.1 * generator.normal(size=63)
    losses[[3, 20, 21, 40]] += 5.0
    losses[[1, 30]] = np.nan, np.inf
    guard = Guard(spike_factor=4.0, window=7)
    accepted, state = run(guard, list(losses))
    assert accepted == naive(guard, list(losses))
    assert [i for i, accept in enumerate(accepted) if not accept] == [1, 20, 21, 30, 40]
    assert state["skipped"] == 5
    assert state["accepted"] == 58
    assert state["in_a_row"] == 0


def test_a_gradient_spike_is_skipped() -> None:
    norms = [1.0, 1.1, 0.9, 1.0, 30.0, 1.0, float("nan"), float("inf")]
    accepted, state = run(Guard(window=4), [2.0] * 8, norms)
    assert accepted == [True] * 4 + [False, True, False, False]
    assert state["in_a_row"] == 2


def test_what_stays_high_is_accepted() -> None:
    """Skipping changes no parameter: what follows a lasting change must not be skipped for ever."""
    generator = np.random.default_rng(0)
    before, after = 0.35 + 0.05 * generator.normal(size=128), 1 + 0.05 * generator.normal(size=200)
    losses = list(4 + 0.05 * generator.normal(size=328))
    accepted, _ = run(Guard(), losses, [*before, *after])
    assert all(accepted[:128])
    skipped = accepted[128:].index(True)
    assert 1 <= skipped <= 8
    assert all(accepted[128 + skipped :])


def test_a_spike_leaves_the_bound_near() -> None:
    values = [2.0, 2.1, 1.9, 2.0] * 32
    accepted, _ = run(Guard(), [*values, 1e4, *values[:8], 4.0])
    assert accepted == [True] * 128 + [False] + [True] * 8 + [False]


def test_a_fall_is_no_spike() -> None:
    accepted, _ = run(Guard(window=4), [5.0, 5.0, 5.0, 5.0, 0.1])
    assert all(accepted)


def test_without_a_factor_only_finiteness_counts() -> None:
    accepted, _ = run(Guard(spike_factor=None, window=2), [1.0, 1.0, 1.0, 1e30, float("nan")])
    assert accepted == [True] * 4 + [False]


def test_a_skipped_step_leaves_the_statistics() -> None:
    guard = Guard(window=3)
    _, before = run(guard, [1.0, 2.0, 3.0, 4.0])
    _, after = run(guard, [1.0, 2.0, 3.0, 4.0, float("nan")])
    for name in ("losses", "gradient_norms", "accepted"):
        np.testing.assert_array_equal(before[name], after[name])
    np.testing.assert_array_equal(after["losses"], [4.0, 2.0, 3.0])


def test_skipped_steps_are_counted_over_the_window() -> None:
    guard = Guard(spike_factor=None, window=7)
    skips = np.random.default_rng(0).random(63) < 0.4
    state = guard.init()
    judge = jax.jit(guard.judge)
    for step, skip in enumerate(skips):
        _, state = judge(state, jnp.float32(jnp.nan if skip else 1.0), jnp.float32(1.0))
        past = skips[: step + 1].tolist()
        assert guard.metrics(state) == {
            "skipped": sum(past),
            "skipped_in_a_row": [*past[::-1], False].index(False),
            "skipped_lately": sum(past[-7:]),
        }


def test_too_many_in_a_row_end_the_run() -> None:
    guard = Guard(limit=3)
    guard.check({"skipped_in_a_row": 3, "skipped_lately": 3}, 100)
    with pytest.raises(UserError, match=r"4 steps in a row up to step 100 .*Guard.limit = 3"):
        guard.check({"skipped_in_a_row": 4, "skipped_lately": 4}, 100)


def test_too_large_a_share_ends_the_run() -> None:
    guard = Guard(window=40, share=0.1)
    guard.check({"skipped_in_a_row": 0, "skipped_lately": 4, "loss": float("nan")}, 7)
    message = r"5 of the last 40 steps up to step 900 .*Guard.share = 0.1\); lower the learning"
    with pytest.raises(UserError, match=message):
        guard.check({"skipped_in_a_row": 1, "skipped_lately": 5}, 900)
    Guard(share=1.0).check({"skipped_in_a_row": 0, "skipped_lately": 128}, 900)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match=r"Guard.window = 1"):
        Guard(window=1)
    with pytest.raises(ConfigError, match=r"Guard.spike_factor = 0"):
        Guard(spike_factor=0.0)
    for share in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=rf"Guard.share = {share} must be from 0 to 1"):
            Guard(share=share)
