"""Dense causal attention, whole or through a sliding window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Array, Float, Int

from seqeff.checks import check_types, require
from seqeff.models.attention.protocol import take_rows
from seqeff.models.caches import BlockCache, CacheKind, TokenCache
from seqeff.models.heads import Heads
from seqeff_kernels.range_attention import TokenSource


class DensePlan(NamedTuple):
    document_start: Int[Array, "batch length"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseAttention:
    """Every token attends all tokens of its document at or before it, or the last `window`."""

    window: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.window is None or self.window >= 1,
            f"DenseAttention.window = {self.window} must be at least 1, or null for no limit",
        )

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        return self

    def cache(self) -> CacheKind:
        """Every token, or a ring of the window's."""
        return TokenCache() if self.window is None else BlockCache(self.window)

    def attended(self, length: int, density: float) -> Float[np.ndarray, " length"]:
        return np.minimum(np.arange(1.0, length + 1), self.window or length)

    def farthest(self, length: int) -> int:
        return min(self.window or length, length)

    def plan(
        self, tokens: Int[Array, "batch length"], document_start: Int[Array, "batch length"] | None
    ) -> DensePlan:
        return DensePlan(document_start)

    def sources(
        self,
        plan: DensePlan,
        heads: Heads,
        first_row: Int[Array, ""] | Int[Array, " batch"] | int,
    ) -> tuple[TokenSource]:
        return (
            TokenSource(
                heads.keys,
                heads.values,
                document_start=take_rows(plan.document_start, first_row, heads.rows),
                window=self.window,
                row_offset=first_row,
            ),
        )
