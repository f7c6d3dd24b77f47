"""One softmax over a few contiguous ranges of keys for every query row; see README.md."""

from seqeff_kernels.range_attention.api import Backend, automatic, explain, range_attention
from seqeff_kernels.range_attention.cost import Cost, cost
from seqeff_kernels.range_attention.packing import PackedIndices, gather, pack
from seqeff_kernels.range_attention.sources import RangeSource, Source, TokenSource

__all__ = [
    "Backend",
    "Cost",
    "PackedIndices",
    "RangeSource",
    "Source",
    "TokenSource",
    "automatic",
    "cost",
    "explain",
    "gather",
    "pack",
    "range_attention",
]
