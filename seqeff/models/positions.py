"""How a token's position in its document enters the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from seqeff.checks import check_types, require
from seqeff.models import parameters, separator_tokens
from seqeff.models.rotary_scaling import RotaryScaling
from seqeff_kernels.rotate_and_append import rotate

_STEPS = 2.0**32  # of a turn


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32 [batch, rows, 1, rotated / 2].

    Both times what rotated dimensions are stretched by (`RotaryScaling.stretch`).
    """

    cosine: Float[Array, "batch rows 1 pairs"]
    sine: Float[Array, "batch rows 1 pairs"]


class Located(NamedTuple):
    """Where tokens are: what their heads are rotated by, and their row of the embedding table."""

    rotated: Int[Array, "batch rows"]
    embedded: Int[Array, "batch rows"]


@runtime_checkable
class Positions(Protocol):
    """Config of a position scheme."""

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        """This config, knowing the decoded text of every token id; most return themselves."""
        ...

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> nnx.Param | None:
        """A table [positions, width] that is added to the token embeddings, if any."""
        ...

    def carry(self, batch: int) -> Any:
        """What `locate` takes on from the tokens before, at the beginning of rows; or None."""
        ...

    def locate(
        self,
        tokens: Int[Array, "batch rows"],
        index: Int[Array, "batch rows"],
        carried: Any,
        count: Int[Array, " batch"] | None,
    ) -> tuple[Located, Any]:
        """Where tokens are, and what is carried on.

        Args:
          index: of each token in its document; below 0 in padding.
          carried: of the tokens before; as `carry` makes it.
          count: how many of each row's tokens are carried over; None: all.
        """
        ...

    @property
    def limit(self) -> int | None:
        """Positions that there are; None: as many as a row has tokens."""
        ...

    @property
    def by_place(self) -> bool:
        """Whether heads are rotated by a token's place in its row, so that they can be turned."""
        ...

    def rotation(
        self, positions: Int[Array, "batch rows"], head_dim: int, *, further: bool = False
    ) -> Rotation | None:
        """What `rotate` needs, computed once for all layers; None when nothing is rotated.

        Args:
          further: for heads that are rotated already, which keep their length.
        """
        ...

    @property
    def interleaved(self) -> bool:
        """Whether the pairs that are rotated are dimensions 2j and 2j + 1, not j and j + pairs."""
        ...

    def rotate(
        self, x: Float[Array, "batch rows heads head_dim"], rotation: Rotation
    ) -> Float[Array, "batch rows heads head_dim"]:
        """Rotates heads; a second rotation adds its positions to the first's."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPositions:
    """Order is known through the causal mask alone."""

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        return self

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> nnx.Param | None:
        return None

    def carry(self, batch: int) -> Any:
        return None

    def locate(
        self,
        tokens: Int[Array, "batch rows"],
        index: Int[Array, "batch rows"],
        carried: Any,
        count: Int[Array, " batch"] | None,
    ) -> tuple[Located, Any]:
        return Located(index, index), carried

    @property
    def limit(self) -> int | None:
        return None

    @property
    def by_place(self) -> bool:
        return False

    def rotation(
        self, positions: Int[Array, "batch rows"], head_dim: int, *, further: bool = False
    ) -> Rotation | None:
        return None

    @property
    def interleaved(self) -> bool:
        return False

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

    @property
    def limit(self) -> int | None:
        return self.length

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> nnx.Param:
        return parameters.normal(rngs, (self.length, width), std, PartitionSpec(None, "fsdp"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary(NoPositions):
    """Rotates pairs of each query's and key's dimensions by angles that grow with the position.

    `fraction` of the head's dimensions, the first ones, are rotated (Pythia: 0.25). Pairs are
    dimensions j and j + rotated / 2 ("half", GPT-NeoX and Llama) or 2j and 2j + 1 ("interleaved",
    GPT-J). `scaling` slows the angles down for rows longer than the model began with. Source: Su et
    al. 2021, section 3.2.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    pairs: Literal["half", "interleaved"] = "half"
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        check_types(self)
        name = type(self).__name__
        require(self.base > 1, f"{name}.base = {self.base} must exceed 1")
        require(0 < self.fraction <= 1, f"{name}.fraction = {self.fraction} must be in (0, 1]")

    @property
    def by_place(self) -> bool:
        return True

    def rotation(
        self, positions: Int[Array, "batch rows"], head_dim: int, *, further: bool = False
    ) -> Rotation:
        rotated = int(head_dim * self.fraction)
        require(
            rotated % 2 == 0 and rotated > 0,
            f"{type(self).__name__}.fraction = {self.fraction} of a head of {head_dim} is "
            f"{rotated} dimensions; an even number is needed",
        )
        turns = self.base ** (-np.arange(0, rotated, 2) / rotated) / (2 * math.pi)
        if self.scaling is not None:
            turns = self.scaling.scale(turns)
        # in 2**-32 of a turn, whole turns fall off an integer product: float32 would have lost the
        # angle of a large position
        steps = np.round(turns * _STEPS)
        rest = jnp.asarray(turns * _STEPS - steps, jnp.float32)
        at = positions[..., None, None]
        product = at.astype(jnp.uint32) * jnp.asarray(steps, jnp.uint32)
        product = jax.lax.bitcast_convert_type(product, jnp.int32).astype(jnp.float32)
        angles = (product + at.astype(jnp.float32) * rest) * (2 * math.pi / _STEPS)
        stretch = 1.0 if self.scaling is None or further else self.scaling.stretch
        return Rotation(stretch * jnp.cos(angles), stretch * jnp.sin(angles))

    def rotate(
        self, x: Float[Array, "batch rows heads head_dim"], rotation: Rotation
    ) -> Float[Array, "batch rows heads head_dim"]:
        return rotate(x, *rotation, self.interleaved)

    @property
    def interleaved(self) -> bool:
        return self.pairs == "interleaved"


class Segments(NamedTuple):
    """Of the tokens so far: separators among them, and tokens after the last one."""

    separators: Int[Array, " batch"]
    since: Int[Array, " batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BilevelPositions(Rotary):
    """Segments' positions rotate heads, and a token's position in its segment is embedded.

    A segment ends with a separator (a token whose text ends with one of `characters`). Tokens past
    `segment_length` of their segment share its last embedding. Source: BiPE (He et al. 2024), as
    SepLLM's training code has it.
    """

    segment_length: int = 256
    characters: str = separator_tokens.CHARACTERS
    preset: str | None = None
    separator_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.segment_length >= 1,
            f"BilevelPositions.segment_length = {self.segment_length} must be at least 1",
        )
        separator_tokens.check("BilevelPositions", self.preset, self.separator_ids)

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        ids = separator_tokens.find(
            "BilevelPositions", vocabulary, self.characters, self.preset, self.separator_ids
        )
        return dataclasses.replace(self, separator_ids=ids, preset=None)

    @property
    def by_place(self) -> bool:
        return False

    def embedding(self, width: int, std: float, rngs: nnx.Rngs) -> nnx.Param:
        shape = (self.segment_length, width)
        return parameters.normal(rngs, shape, std, PartitionSpec(None, "fsdp"))

    def carry(self, batch: int) -> Segments:
        return Segments(*jnp.zeros((2, batch), jnp.int32))

    def locate(
        self,
        tokens: Int[Array, "batch rows"],
        index: Int[Array, "batch rows"],
        carried: Segments,
        count: Int[Array, " batch"] | None,
    ) -> tuple[Located, Segments]:
        require(
            self.separator_ids is not None,
            "BilevelPositions.separator_ids is not set: bind it, or call for_vocabulary with the "
            "tokenizer's vocabulary",
        )
        batch, rows = tokens.shape
        row = jnp.broadcast_to(jnp.arange(rows + 1), (batch, rows + 1))
        ends = separator_tokens.are_separators(self.separator_ids or (), tokens)
        # at [i], what the tokens before token i of the row make
        before = jnp.pad(jnp.cumsum(ends, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
        last = jnp.pad(jnp.where(ends, row[:, 1:], 0), ((0, 0), (1, 0)))
        last = jax.lax.cummax(last, axis=1)
        # a document that begins in these rows takes nothing on
        first = row[:, :-1] - index
        begins = jnp.pad(first, ((0, 0), (0, 1)), mode="edge")
        at_begin = jnp.take_along_axis(before, jnp.clip(begins, 0, rows), axis=1)
        carries = begins < 0
        separators = before - at_begin + jnp.where(carries, carried.separators[:, None], 0)
        start = jnp.maximum(last, begins)
        since = row - jnp.where(carries & (last == 0), -carried.since[:, None], start)
        taken = jnp.full((batch, 1), rows) if count is None else count[:, None]
        segments = Segments(
            *(jnp.take_along_axis(x, taken, axis=1)[:, 0] for x in (separators, since))
        )
        embedded = jnp.clip(since[:, :-1], 0, self.segment_length - 1)
        return Located(separators[:, :-1], embedded), segments
