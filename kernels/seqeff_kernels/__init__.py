"""Attention operations for JAX, usable without the rest of seqeff."""

from seqeff_kernels.decode_attention import CacheBlock, decode_attention
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
    "CacheBlock",
    "Cost",
    "PackedIndices",
    "RangeSource",
    "Source",
    "TokenSource",
    "cost",
    "decode_attention",
    "explain",
    "gather",
    "pack",
    "range_attention",
]
