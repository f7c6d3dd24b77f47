"""Learning rates over a run: warm-up, then a shape, each a config that makes an optax schedule.

A run of `steps` steps uses the schedule at 0 ... steps - 1. With w steps of warm-up the rate at
step s < w is peak * (s + 1) / (w + 1), so no step is wasted on a rate of zero; it is the peak at
step w, and would be its final value at `steps`, one past the last.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from seqeff.checks import ConfigError, check_types, require


@runtime_checkable
class Schedule(Protocol):
    """Config of a schedule."""

    def make(self, peak: float, steps: int) -> optax.Schedule:
        """The rate by step, for a run of `steps` steps whose highest rate is `peak`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak from the end of the warm-up on.

    Attributes:
      warmup: steps of linear warm-up, or, as a float below 1, a fraction of the run.
    """

    warmup: int | float = 0

    def __post_init__(self) -> None:
        check_types(self)
        _check_length("Constant.warmup", self.warmup)

    def make(self, peak: float, steps: int) -> optax.Schedule:
        warmup = _length("Constant.warmup", self.warmup, steps)
        return lambda step: peak * _ramp(step, warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear decay from the end of the warm-up to the end of the run.

    Attributes:
      warmup: steps of linear warm-up, or, as a float below 1, a fraction of the run.
      final_fraction: of the peak, at the end of the run.
    """

    warmup: int | float = 0.01
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        _check_length("Linear.warmup", self.warmup)
        _check_fraction("Linear.final_fraction", self.final_fraction)

    def make(self, peak: float, steps: int) -> optax.Schedule:
        warmup = _length("Linear.warmup", self.warmup, steps)

        def rate(step: ArrayLike) -> jax.Array:
            height = 1 - _progress(step, warmup, steps)
            return peak * _ramp(step, warmup) * _above(self.final_fraction, height)

        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the end of the warm-up to the end of the run (SGDR, 1608.03983, eq. 5).

    Attributes:
      warmup: steps of linear warm-up, or, as a float below 1, a fraction of the run.
      final_fraction: of the peak, at the end of the run.
    """

    warmup: int | float = 0.01
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        _check_length("Cosine.warmup", self.warmup)
        _check_fraction("Cosine.final_fraction", self.final_fraction)

    def make(self, peak: float, steps: int) -> optax.Schedule:
        warmup = _length("Cosine.warmup", self.warmup, steps)

        def rate(step: ArrayLike) -> jax.Array:
            height = (1 + jnp.cos(math.pi * _progress(step, warmup, steps))) / 2
            return peak * _ramp(step, warmup) * _above(self.final_fraction, height)

        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Constant between a warm-up and a linear decay at the end (MiniCPM, 2404.06395, section 4.2).

    Attributes:
      warmup: steps of linear warm-up, or, as a float below 1, a fraction of the run.
      decay: last steps, in which the rate falls; or, as a float below 1, a fraction of the run.
      final_fraction: of the peak, at the end of the run.
    """

    warmup: int | float = 0.01
    decay: int | float = 0.2
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        _check_length("WarmupStableDecay.warmup", self.warmup)
        _check_length("WarmupStableDecay.decay", self.decay)
        _check_fraction("WarmupStableDecay.final_fraction", self.final_fraction)

    def make(self, peak: float, steps: int) -> optax.Schedule:
        warmup = _length("WarmupStableDecay.warmup", self.warmup, steps)
        decay = _length("WarmupStableDecay.decay", self.decay, steps)
        require(
            warmup + decay <= steps,
            f"WarmupStableDecay.warmup ({warmup} steps) and decay ({decay} steps) exceed the "
            f"run's {steps} steps",
        )

        def rate(step: ArrayLike) -> jax.Array:
            height = 1 - _progress(step, steps - decay, steps)
            return peak * _ramp(step, warmup) * _above(self.final_fraction, height)

        return rate


def _check_length(name: str, value: float) -> None:
    if isinstance(value, int):
        require(value >= 0, f"{name} = {value} steps must not be negative")
    else:
        require(
            0 <= value < 1,
            f"{name} = {value} is a fraction of the run and must be below 1; "
            "for a number of steps give an integer",
        )


def _check_fraction(name: str, value: float) -> None:
    require(0 <= value <= 1, f"{name} = {value} must be between 0 and 1")


def _length(name: str, value: float, steps: int) -> int:
    """A number of steps, given as such or as a fraction of the run."""
    length = value if isinstance(value, int) else round(value * steps)
    if length > steps:
        raise ConfigError(f"{name} = {value} steps exceeds the run's {steps} steps")
    return length


def _ramp(step: ArrayLike, warmup: int) -> jax.Array:
    step = jnp.asarray(step)
    return jnp.where(step < warmup, (step + 1) / (warmup + 1), 1.0)


def _progress(step: ArrayLike, start: int, end: int) -> jax.Array:
    """0 up to step `start`, 1 from step `end` on."""
    step = jnp.asarray(step)
    return jnp.where(step < end, jnp.maximum(step - start, 0) / max(end - start, 1), 1.0)


def _above(final_fraction: float, height: jax.Array) -> jax.Array:
    """From the final fraction at height 0 to 1 at height 1."""
    return final_fraction + (1 - final_fraction) * height
