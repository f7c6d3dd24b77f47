"""How a backend serves a call: its plan, and the tiles that its kernels visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax import Array
from jaxtyping import Float

from seqeff_kernels.range_attention.cost import cost
from seqeff_kernels.range_attention.sources import Source


class Walk(NamedTuple):
    """The tiles of one source that a kernel visits: those in which some row attends some entry.

    Attributes:
      source: its index.
      products: dot products of `head_dim` that each pair of a tile takes.
      batch_shares_tiles: as in `cost`.
    """

    source: int
    tile_rows: int
    tile_entries: int
    products: int
    batch_shares_tiles: bool = False


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a backend serves a call.

    Attributes:
      backend: its name.
      plan: the fields of its plan; none where it has nothing to plan.
      deterministic: whether gradients have the same bits every time; None: not known.
      forward: what the forward pass walks; None: not known.
      backward: what the backward pass walks; None: not known.
    """

    backend: str
    plan: Mapping[str, Any]
    deterministic: bool | None
    forward: Sequence[Walk] | None = None
    backward: Sequence[Walk] | None = None


def executed_flops(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: Sequence[Source],
    walks: Sequence[Walk],
) -> int:
    """FLOPs of whole tiles, as the tensor cores do them; the sources' bounds must be concrete."""
    pairs = [
        walk.products
        * cost(
            queries,
            [sources[walk.source]],
            tile_rows=walk.tile_rows,
            tile_entries=walk.tile_entries,
            batch_shares_tiles=walk.batch_shares_tiles,
        ).executed_pairs
        for walk in walks
    ]
    return 2 * queries.shape[-1] * sum(pairs)
