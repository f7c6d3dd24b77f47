"""Attention of a row's newest tokens over blocks of cached keys and values; see README.md."""

from seqeff_kernels.decode_attention.api import (
    Backend,
    Execution,
    automatic,
    decode_attention,
    execution,
    explain,
    obstacle,
)
from seqeff_kernels.decode_attention.blocks import CacheBlock

__all__ = [
    "Backend",
    "CacheBlock",
    "Execution",
    "automatic",
    "decode_attention",
    "execution",
    "explain",
    "obstacle",
]
