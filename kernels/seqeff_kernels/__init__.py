"""Attention operations for JAX, usable without the rest of seqeff."""

from seqeff_kernels.range_attention import (
    Cost,
    PackedIndices,
    RangeSource,
    Source,
    TokenSource,
    cost,
    explain,
    gather,
    pack,
    range_attention,
)

__all__ = [
    "Cost",
    "PackedIndices",
    "RangeSource",
    "Source",
    "TokenSource",
    "cost",
    "explain",
    "gather",
    "pack",
    "range_attention",
]
