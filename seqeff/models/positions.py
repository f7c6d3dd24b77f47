"""How a token's position in its document enters the model."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from seqeff.checks import check_types, require
from seqeff.models import parameters


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32 [batch, rows, 1, rotated / 2]."""

    cosine: Float[Array, "batch rows 1 pairs"]
    sine: Float[Array, "batch rows 1 pairs"]


@runtime_checkable
class Positions(Protocol):
    """Config of a position scheme. A position is a token's index in its document."""

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> nnx.Param | None:
        """A table [positions, width] that is added to the token embeddings, if any."""
        ...

    def rotation(self, positions: Int[Array, "batch rows"], head_dim: int) -> Rotation | None:
        """What `rotate` needs, computed once for all layers; None when nothing is rotated."""
        ...

    def rotate(
        self, x: Float[Array, "batch rows heads head_dim"], rotation: Rotation
    ) -> Float[Array, "batch rows heads head_dim"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositions:
    """Order is known through the causal mask alone."""

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> None:
        return None

    def rotation(self, positions: Int[Array, "batch rows"], head_dim: int) -> None:
        return None

    def rotate(
        self, x: Float[Array, "batch rows heads head_dim"], rotation: Rotation
    ) -> Float[Array, "batch rows heads head_dim"]:
        return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedPositions(NoPositions):
    """A learned vector for each of `length` positions, added to the embedding (GPT-2, OPT)."""

    length: int

    def __post_init__(self) -> None:
        check_types(self)
        require(self.length >= 1, f"LearnedPositions.length = {self.length} must be at least 1")

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> nnx.Param:
        return parameters.normal(rngs, (self.length, width), std, PartitionSpec(None, "fsdp"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotates pairs of each query's and key's dimensions by angles that grow with the position.

    `fraction` of the head's dimensions, the first ones, are rotated (Pythia: 0.25). Pairs are
    dimensions j and j + rotated / 2 ("half", GPT-NeoX and Llama) or 2j and 2j + 1 ("interleaved",
    GPT-J). Source: Su et al. 2021, section 3.2.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    pairs: Literal["half", "interleaved"] = "half"

    def __post_init__(self) -> None:
        check_types(self)
        require(self.base > 1, f"Rotary.base = {self.base} must exceed 1")
        require(0 < self.fraction <= 1, f"Rotary.fraction = {self.fraction} must be in (0, 1]")

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> None:
        return None

    def rotation(self, positions: Int[Array, "batch rows"], head_dim: int) -> Rotation:
        rotated = int(head_dim * self.fraction)
        require(
            rotated % 2 == 0 and rotated > 0,
            f"Rotary.fraction = {self.fraction} of a head of {head_dim} is {rotated} dimensions; "
            "an even number is needed",
        )
        frequencies = self.base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        return Rotation(jnp.cos(angles), jnp.sin(angles))

    def rotate(
        self, x: Float[Array, "batch rows heads head_dim"], rotation: Rotation
    ) -> Float[Array, "batch rows heads head_dim"]:
        cosine, sine = rotation
        pairs = cosine.shape[-1]
        turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
        if self.pairs == "half":
            first, second = turned[..., :pairs], turned[..., pairs:]
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
        first, second = first * cosine - second * sine, second * cosine + first * sine
        if self.pairs == "half":
            turned = jnp.concatenate([first, second], axis=-1)
        else:
            turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
        return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
