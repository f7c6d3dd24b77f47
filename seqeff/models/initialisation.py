"""Standard deviations that model families give their projections at the start."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

from seqeff.checks import check_types, require


@runtime_checkable
class Initialisation(Protocol):
    """Standard deviations for a model of a width and a number of layers."""

    def embedding_std(self, width: int) -> float: ...

    def input_std(self, width: int) -> float:
        """For projections that read the residual stream, and for the output head."""
        ...

    def output_std(self, width: int, layers: int) -> float:
        """For projections that write to the residual stream."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalInitialisation:
    """One standard deviation for all; GPT-2 and OPT divide the writers' by sqrt(2 layers).

    Source: Radford et al. 2019, section 2.3 (`scale_by_depth`); Llama draws all alike.
    """

    std: float = 0.02
    scale_by_depth: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self.std > 0, f"NormalInitialisation.std = {self.std} must be positive")

    def embedding_std(self, width: int) -> float:
        return self.std

    def input_std(self, width: int) -> float:
        return self.std

    def output_std(self, width: int, layers: int) -> float:
        return self.std / math.sqrt(2 * layers) if self.scale_by_depth else self.std


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallInitialisation:
    """GPT-NeoX and Pythia: readers sqrt(2 / (5 width)), writers 2 / (layers sqrt(width)).

    Source: Nguyen and Salazar 2019 ("small init"); Wang and Komatsuzaki 2021 (GPT-J, "wang init").
    """

    def embedding_std(self, width: int) -> float:
        return self.input_std(width)

    def input_std(self, width: int) -> float:
        return math.sqrt(2 / (5 * width))

    def output_std(self, width: int, layers: int) -> float:
        return 2 / (layers * math.sqrt(width))
