"""Attention operations for JAX, usable without the rest of seqeff.

Beside each operation, in its module, is `explain`: why a backend can or cannot serve a call.
"""

from seqeff_kernels.decode_attention import CacheBlock, decode_attention
from seqeff_kernels.range_attention import (
    Cost,
    PackedIndices,
    RangeSource,
    Source,
    TokenSource,
    cost,
    gather,
    pack,
    range_attention,
)
from seqeff_kernels.rotate_and_append import rotate_and_append

__all__ = [
    "CacheBlock",
    "Cost",
    "PackedIndices",
    "RangeSource",
    "Source",
    "TokenSource",
    "cost",
    "decode_attention",
    "gather",
    "pack",
    "range_attention",
    "rotate_and_append",
]
