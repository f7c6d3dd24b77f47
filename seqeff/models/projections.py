"""From the residual stream to queries, keys and values, and back."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqeff.checks import check_types, require
from seqeff.models.initialisation import Initialisation
from seqeff.models.linear import DenseLinear, Linear
from seqeff.models.norms import Norm
from seqeff.models.parameters import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadProjections:
    """Multi-head, grouped-query (`kv_heads` < `heads`) or multi-query (`kv_heads` = 1) projections.

    `kv_heads` defaults to `heads`, `head_dim` to width / heads. `head_norm` normalises each head of
    queries and keys before it is rotated (Qwen3).
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = True
    output_bias: bool | None = None
    head_norm: Norm | None = None
    query: Linear = DenseLinear()
    key: Linear = DenseLinear()
    value: Linear = DenseLinear()
    output: Linear = DenseLinear()

    def __post_init__(self) -> None:
        check_types(self)
        require(self.heads >= 1, f"HeadProjections.heads = {self.heads} must be at least 1")
        require(
            self.kv_heads is None or (self.kv_heads >= 1 and self.heads % self.kv_heads == 0),
            f"HeadProjections.kv_heads = {self.kv_heads} must divide heads = {self.heads}",
        )
        require(
            self.head_dim is None or self.head_dim >= 1,
            f"HeadProjections.head_dim = {self.head_dim} must be at least 1",
        )

    def groups(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    def size(self, width: int) -> int:
        """Dimensions of a head."""
        require(
            self.head_dim is not None or width % self.heads == 0,
            f"HeadProjections.heads = {self.heads} must divide TransformerConfig.width = {width}, "
            "or HeadProjections.head_dim must be given",
        )
        return self.head_dim or width // self.heads

    def make(
        self, width: int, layers: int, initialisation: Initialisation, rngs: nnx.Rngs
    ) -> HeadProjectionsLayer:
        return HeadProjectionsLayer(self, width, layers, initialisation, rngs)


class HeadProjectionsLayer(nnx.Module):
    def __init__(
        self,
        config: HeadProjections,
        width: int,
        layers: int,
        initialisation: Initialisation,
        rngs: nnx.Rngs,
    ) -> None:
        self.head_dim = config.size(width)
        self.heads = config.heads

        def reader(linear: Linear, heads: int) -> nnx.Module:
            return linear.make(
                width,
                heads * self.head_dim,
                bias=config.bias,
                std=initialisation.input_std(width),
                partition=PartitionSpec("fsdp", "tensor"),
                rngs=rngs,
            )

        self.query = reader(config.query, config.heads)
        self.key = reader(config.key, config.groups())
        self.value = reader(config.value, config.groups())
        norm = config.head_norm
        self.query_norm = None if norm is None else norm.make(self.head_dim)
        self.key_norm = None if norm is None else norm.make(self.head_dim)
        self.output = config.output.make(
            config.heads * self.head_dim,
            width,
            bias=config.bias if config.output_bias is None else config.output_bias,
            std=initialisation.output_std(width, layers),
            partition=PartitionSpec("tensor", "fsdp"),
            rngs=rngs,
        )

    def split(
        self, x: Float[Array, "batch rows width"]
    ) -> tuple[
        Float[Array, "batch rows heads head_dim"],
        Float[Array, "batch rows kv_heads head_dim"],
        Float[Array, "batch rows kv_heads head_dim"],
    ]:
        """Queries, keys and values of every row."""

        def heads(projected: jax.Array, norm: nnx.Module | None) -> jax.Array:
            shaped = projected.reshape(*projected.shape[:-1], -1, self.head_dim)
            return constrain(shaped if norm is None else norm(shaped), None, "tensor", None)

        return (
            heads(self.query(x), self.query_norm),
            heads(self.key(x), self.key_norm),
            heads(self.value(x), None),
        )

    def merge(
        self, attended: Float[Array, "batch rows heads head_dim"]
    ) -> Float[Array, "batch rows width"]:
        """The heads' outputs, written back to the residual stream's width."""
        return self.output(attended.reshape(*attended.shape[:-2], -1))
