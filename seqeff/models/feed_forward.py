"""The position-wise feed-forward part of a layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqeff.checks import check_types, require
from seqeff.models import parameters
from seqeff.models.initialisation import Initialisation
from seqeff.models.linear import DenseLinear, Linear


def _gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """X Phi(x) in float32 (Hendrycks and Gimpel 2016).

    `jax.nn.gelu` takes erfc, of which XLA computes two forms for every element.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(math.sqrt(0.5) * wide))).astype(x.dtype)


_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForward:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) when `gated`.

    SwiGLU is `gated` with `silu` (Shazeer 2020). `hidden` is the inner width.
    """

    hidden: int
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    gated: bool = False
    bias: bool = True
    up: Linear = DenseLinear()
    gate: Linear = DenseLinear()
    down: Linear = DenseLinear()

    def __post_init__(self) -> None:
        check_types(self)
        require(self.hidden >= 1, f"FeedForward.hidden = {self.hidden} must be at least 1")

    def activate(
        self, up: Float[Array, "*rows hidden"], gate: Float[Array, "*rows hidden"] | None
    ) -> Float[Array, "*rows hidden"]:
        """What `down` takes, of what `up` and, when gated, `gate` give."""
        activation = _ACTIVATIONS[self.activation]
        return activation(up) if gate is None else activation(gate) * up

    def make(
        self, width: int, layers: int, initialisation: Initialisation, rngs: nnx.Rngs
    ) -> FeedForwardLayer:
        return FeedForwardLayer(self, width, layers, initialisation, rngs)


class FeedForwardLayer(nnx.Module):
    def __init__(
        self,
        config: FeedForward,
        width: int,
        layers: int,
        initialisation: Initialisation,
        rngs: nnx.Rngs,
    ) -> None:
        def into(linear: Linear) -> nnx.Module:
            return linear.make(
                width,
                config.hidden,
                bias=config.bias,
                std=initialisation.input_std(width),
                partition=PartitionSpec("fsdp", "tensor"),
                rngs=rngs,
            )

        self.config = config
        self.up = into(config.up)
        self.gate = into(config.gate) if config.gated else None
        self.down = config.down.make(
            config.hidden,
            width,
            bias=config.bias,
            std=initialisation.output_std(width, layers),
            partition=PartitionSpec("tensor", "fsdp"),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch rows width"]) -> Float[Array, "batch rows width"]:
        gate = None if self.gate is None else self.gate(x)
        hidden = self.config.activate(self.up(x), gate)
        return self.down(parameters.constrain(hidden, None, "tensor"))
