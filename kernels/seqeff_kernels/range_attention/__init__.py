"""One softmax over a few contiguous ranges of keys for every query row; see README.md."""

from seqeff_kernels.range_attention.api import (
    Backend,
    automatic,
    execution,
    explain,
    obstacle,
    range_attention,
)
from seqeff_kernels.range_attention.cost import Cost, cost
from seqeff_kernels.range_attention.execution import Execution, executed_flops
from seqeff_kernels.range_attention.packing import PackedIndices, gather, pack
from seqeff_kernels.range_attention.sources import RangeSource, Source, TokenSource

__all__ = [
    "Backend",
    "Cost",
    "Execution",
    "PackedIndices",
    "RangeSource",
    "Source",
    "TokenSource",
    "automatic",
    "cost",
    "executed_flops",
    "execution",
    "explain",
    "gather",
    "obstacle",
    "pack",
    "range_attention",
]
