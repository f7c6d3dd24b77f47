"""Linear layers that a projection can be bound to: dense, or factored through a rank."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqeff.checks import check_types, require
from seqeff.models import parameters


@runtime_checkable
class Linear(Protocol):
    """Config of a linear map; `make` builds the layer that applies it."""

    def make(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        std: float,
        partition: PartitionSpec,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """A module from [..., inputs] to [..., outputs].

        Args:
          std: standard deviation that each weight of the whole map starts with.
          partition: mesh axes of the map's input and output dimension.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseLinear:
    """y = x W + b."""

    def make(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        std: float,
        partition: PartitionSpec,
        rngs: nnx.Rngs,
    ) -> DenseLayer:
        return DenseLayer(inputs, outputs, bias, std, partition, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankLinear:
    """y = (x A) B + b with A [inputs, rank] and B [rank, outputs].

    Cheaper than dense when rank < inputs * outputs / (inputs + outputs).
    """

    rank: int

    def __post_init__(self) -> None:
        check_types(self)
        require(self.rank >= 1, f"LowRankLinear.rank = {self.rank} must be at least 1")

    def make(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        std: float,
        partition: PartitionSpec,
        rngs: nnx.Rngs,
    ) -> LowRankLayer:
        require(
            self.rank <= min(inputs, outputs),
            f"LowRankLinear.rank = {self.rank} exceeds the {inputs} x {outputs} projection it "
            f"factors; give at most {min(inputs, outputs)}",
        )
        return LowRankLayer(inputs, outputs, self.rank, bias, std, partition, rngs)


class DenseLayer(nnx.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        std: float,
        partition: PartitionSpec,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = parameters.normal(rngs, (inputs, outputs), std, partition)
        self.bias = (
            parameters.constant((outputs,), 0.0, PartitionSpec(partition[1])) if bias else None
        )

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        return _add_bias(self.product(x), self.bias)

    def product(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        """The same without the bias."""
        return _multiply(x, self.kernel[...])


class LowRankLayer(nnx.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        bias: bool,
        std: float,
        partition: PartitionSpec,
        rngs: nnx.Rngs,
    ) -> None:
        # the product of the factors has entries of standard deviation std
        self.down = parameters.normal(
            rngs, (inputs, rank), 1 / math.sqrt(inputs), PartitionSpec(partition[0], None)
        )
        self.up = parameters.normal(
            rngs, (rank, outputs), std * math.sqrt(inputs / rank), PartitionSpec(None, partition[1])
        )
        self.bias = (
            parameters.constant((outputs,), 0.0, PartitionSpec(partition[1])) if bias else None
        )

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        return _add_bias(_multiply(_multiply(x, self.down[...]), self.up[...]), self.bias)


def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x, kernel.astype(x.dtype))


def _add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return x if bias is None else x + bias[...].astype(x.dtype)
