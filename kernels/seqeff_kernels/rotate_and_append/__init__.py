"""Rotates new queries and keys, and writes new entries into a cache in place; see README.md."""

from seqeff_kernels.rotate_and_append.api import (
    Backend,
    automatic,
    explain,
    obstacle,
    rotate_and_append,
)
from seqeff_kernels.rotate_and_append.xla import put, rotate

__all__ = ["Backend", "automatic", "explain", "obstacle", "put", "rotate", "rotate_and_append"]
