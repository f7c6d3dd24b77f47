"""How rotary angles are slowed down, so that longer rows stay within the angles of training."""

from __future__ import annotations

import dataclasses
import math
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

    @property
    def stretch(self) -> float:
        """What the rotated dimensions of queries and of keys are multiplied by."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every pair turns `factor` times slower: position interpolation (Chen et al. 2023)."""

    factor: float

    def __post_init__(self) -> None:
        check_types(self)
        require(self.factor > 0, f"LinearScaling.factor = {self.factor} must be positive")

    @property
    def stretch(self) -> float:
        return 1.0

    def scale(self, turns: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        return turns / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Pairs that turn slowly turn `factor` times slower still, fast ones as before (Llama 3.1).

    A pair is slow if it makes at most `low_frequency_factor` turns in `original_length` tokens, the
    length of pre-training, and fast from `high_frequency_factor` on; in between it is interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

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

    @property
    def stretch(self) -> float:
        return 1.0

    def scale(self, turns: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        fast = np.clip((turns * self.original_length - low) / (high - low), 0, 1)
        return (1 - fast) * turns / self.factor + fast * turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """The last pairs turn `factor` times slower, the first as before, a ramp of pairs in between.

    Attributes:
      original_length: of pre-training, in tokens.
      fast, slow: the ramp begins at the pair that makes `fast` turns in that length, and ends at
        the one that makes `slow`.
      attention_factor: that queries and keys are stretched by; null: 1 + ln(factor) / 10.

    Source: YaRN (arXiv 2309.00071), sections 3.2 and 3.4; the ramp runs over whole pairs, as in its
    code.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(self.factor >= 1, f"YarnScaling.factor = {self.factor} must be at least 1")
        require(
            self.original_length >= 1,
            f"YarnScaling.original_length = {self.original_length} must be at least 1",
        )
        require(
            0 < self.slow < self.fast,
            f"YarnScaling.slow = {self.slow} must be positive and below fast = {self.fast}",
        )
        require(
            self.attention_factor is None or self.attention_factor > 0,
            f"YarnScaling.attention_factor = {self.attention_factor} must be positive, or null",
        )

    @property
    def stretch(self) -> float:
        if self.attention_factor is None:
            return 1 + math.log(self.factor) / 10
        return self.attention_factor

    def scale(self, turns: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        require(len(turns) >= 2, "YarnScaling needs heads with at least 2 rotated pairs")
        ratio = math.log(turns[0] / turns[1])
        # pairs, as real numbers, that make so many turns in the original length
        fast, slow = (
            math.log(turns[0] * self.original_length / count) / ratio
            for count in (self.fast, self.slow)
        )
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), 2 * len(turns) - 1)
        # where both are one pair, a step
        width = max(last - first, 1e-3)
        slowed = np.clip((np.arange(len(turns)) - first) / width, 0, 1)
        return turns * (1 - slowed) + turns / self.factor * slowed
