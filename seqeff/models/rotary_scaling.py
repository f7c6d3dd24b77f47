"""How rotary angles are slowed down, so that longer rows stay within the angles of training."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from seqeff.checks import check_types, require


@runtime_checkable
class RotaryScaling(Protocol):
    """Config of a change of the rotary frequencies."""

    def scale(self, turns: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        """From the turns that each pair of dimensions makes a token to those that it shall make."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every pair turns `factor` times slower: position interpolation (Chen et al. 2023)."""

    factor: float

    def __post_init__(self) -> None:
        check_types(self)
        require(self.factor > 0, f"LinearScaling.factor = {self.factor} must be positive")

    def scale(self, turns: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        return turns / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Pairs that turn slowly turn `factor` times slower still, fast ones as before (Llama 3.1).

    A pair is slow if it makes at most `low_frequency_factor` turns in `original_length` tokens, the
    length of pre-training, and fast from `high_frequency_factor` on; in between it is interpolated.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        check_types(self)
        require(self.factor > 0, f"Llama3Scaling.factor = {self.factor} must be positive")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        require(
            0 < low < high,
            f"Llama3Scaling.low_frequency_factor = {low} must be positive and below "
            f"high_frequency_factor = {high}",
        )
        require(
            self.original_length >= 1,
            f"Llama3Scaling.original_length = {self.original_length} must be at least 1",
        )

    def scale(self, turns: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        fast = np.clip((turns * self.original_length - low) / (high - low), 0, 1)
        return (1 - fast) * turns / self.factor + fast * turns
