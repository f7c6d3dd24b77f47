"""Normalisation of the residual stream, computed in float32."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqeff.checks import check_types, require
from seqeff.models import parameters


@runtime_checkable
class Norm(Protocol):
    """Config of a norm; `make` builds the layer for a width."""

    def make(self, width: int) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Mean and variance to 0 and 1, then scale and bias (Ba et al. 2016)."""

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_types(self)
        require(self.epsilon > 0, f"LayerNorm.epsilon = {self.epsilon} must be positive")

    def make(self, width: int) -> LayerNormLayer:
        return LayerNormLayer(self, width)

    def standardise(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Float32, before scale and bias."""
        full = x.astype(jnp.float32)
        full = full - jnp.mean(full, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(full), axis=-1, keepdims=True)
        return full * jax.lax.rsqrt(variance + self.epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """Root mean square to 1, then scale (Zhang and Sennrich 2019)."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self)
        require(self.epsilon > 0, f"RMSNorm.epsilon = {self.epsilon} must be positive")

    def make(self, width: int) -> RMSNormLayer:
        return RMSNormLayer(self, width)

    def standardise(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Float32, before the scale."""
        full = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(full), axis=-1, keepdims=True)
        return full * jax.lax.rsqrt(square + self.epsilon)


class LayerNormLayer(nnx.Module):
    def __init__(self, config: LayerNorm, width: int) -> None:
        self.config = config
        self.scale = parameters.constant((width,), 1.0, PartitionSpec(None))
        self.bias = parameters.constant((width,), 0.0, PartitionSpec(None))

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        normed = self.config.standardise(x)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNormLayer(nnx.Module):
    def __init__(self, config: RMSNorm, width: int) -> None:
        self.config = config
        self.scale = parameters.constant((width,), 1.0, PartitionSpec(None))

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        return (self.config.standardise(x) * self.scale[...]).astype(x.dtype)
