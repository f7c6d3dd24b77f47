"""What a layer's attention is given: queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from seqeff.checks import ConfigError


class Joined(NamedTuple):
    """A layer's queries, keys and values as one product gave them, and how they are rotated.

    Attributes:
      columns: queries of all heads, then keys, then values of all KV heads, then anything; to all
        of which the bias is to be added.
      rotation: cosine and sine; None: not at all.
      interleaved: as `Positions.interleaved`.
    """

    columns: Float[Array, "batch rows columns"]
    bias: Float[Array, " columns"]
    rotation: tuple[Float[Array, "batch rows pairs"], Float[Array, "batch rows pairs"]] | None
    interleaved: bool


class Heads(NamedTuple):
    """A layer's queries, keys and values, rotated by their own positions.

    Attributes:
      turn: rotates queries or keys by so many positions more; None where a token's place in its
        row is not what heads are rotated by.
      joined: the same before they were taken apart and rotated, where there is such an array: for
        caches that rotate and write at once.
    """

    queries: Float[Array, "batch rows heads head_dim"]
    keys: Float[Array, "batch length kv_heads head_dim"]
    values: Float[Array, "batch length kv_heads head_dim"]
    turn: Callable[[Array, Int[Array, "batch length"]], Array] | None = None
    joined: Joined | None = None

    @property
    def rows(self) -> int:
        """How many rows attend."""
        return self.queries.shape[1]

    def turned(self, x: Array, by: Int[Array, "batch length"]) -> Array:
        """Queries or keys turned by so many positions, as compact positions want them.

        Raises:
          ConfigError: they cannot be.
        """
        if self.turn is None:
            raise ConfigError(
                "SeparatorAttention.positions = 'compact' needs positions that rotate heads by a "
                "token's place in its row: TransformerConfig.positions = @Rotary()"
            )
        return self.turn(x, by)
