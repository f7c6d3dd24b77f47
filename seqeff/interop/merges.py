"""Layers that go out multiplied out: as dense ones, which they equal up to rounding.

One more kind of layer is a function of its parameters, and a name in `MERGES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from seqeff.interop.tensors import of_layer
from seqeff.models import DenseLinear, LowRankLinear, TransformerConfig

_KERNEL = "kernel"

Kernel = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""The kernel [inputs, outputs] of one layer's linear map, from the map's parameters by name."""


class Merged(NamedTuple):
    """A model, and the one that it is once multiplied out.

    Attributes:
      plain: what it is then.
      kernels: by the dotted paths of those parameters of `plain` that the model has factors of.
    """

    plain: TransformerConfig
    kernels: Mapping[str, Kernel]

    def parameter(
        self, parameters: Mapping[str, np.ndarray], path: str, layer: int | None
    ) -> np.ndarray:
        """A parameter of `plain`; one that is multiplied out here is in float64.

        Args:
          parameters: of the model, by dotted path.
          layer: whose it is; None: of no layer.
        """
        if path not in self.kernels:
            return of_layer(parameters[path], layer)
        own = path.removesuffix(_KERNEL)
        factors = {
            name.removeprefix(own): of_layer(array, layer)
            for name, array in parameters.items()
            if name.startswith(own)
        }
        return self.kernels[path](factors)


def merge(config: TransformerConfig) -> Merged:
    """Multiplies out what can be."""
    parts: dict[str, Any] = {}
    kernels: dict[str, Kernel] = {}
    for part in ("projections", "feed_forward"):
        own = getattr(config, part)
        kinds = {field.name: type(getattr(own, field.name)) for field in dataclasses.fields(own)}
        found = {name: MERGES[kind] for name, kind in kinds.items() if kind in MERGES}
        parts[part] = dataclasses.replace(own, **dict.fromkeys(found, DenseLinear()))
        kernels |= {f"layers.{part}.{name}.{_KERNEL}": kernel for name, kernel in found.items()}
    return Merged(dataclasses.replace(config, **parts), kernels)


def low_rank(factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A B of y = (x A) B."""
    return factors["down"].astype(np.float64) @ factors["up"].astype(np.float64)


MERGES: Mapping[type, Kernel] = {LowRankLinear: low_rank}
"""By class of a linear map's config, how its kernel is made."""
