"""Attention of a row's newest tokens over blocks of cached keys and values; see README.md."""

from seqeff_kernels.decode_attention.api import automatic, decode_attention, explain
from seqeff_kernels.decode_attention.blocks import CacheBlock

__all__ = ["CacheBlock", "automatic", "decode_attention", "explain"]
