"""Interval attention: the initial tokens, one token in every `interval`, and a window.

It is FixLLM, the baseline of SepLLM (arXiv 2412.12094, section 4) that keeps tokens at a fixed
distance where SepLLM keeps the separators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from seqeff.checks import check_types, require
from seqeff.models.attention.protocol import Heads, take_rows
from seqeff_kernels.range_attention import (
    PackedIndices,
    RangeSource,
    Source,
    TokenSource,
    pack,
)


class IntervalPlan(NamedTuple):
    """The kept tokens, packed, and the range of them that each row attends beside its window."""

    packed: PackedIndices
    start: Int[Array, "batch length"]
    end: Int[Array, "batch length"]
    document_start: Int[Array, "batch length"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntervalAttention:
    """Row i attends j <= i where j is initial, a multiple of `interval`, or in the last `window`.

    Tokens are counted from 0 in each document. `window` counts the token itself.
    """

    interval: int = 8
    initial_tokens: int = 3
    window: int = 64

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("interval", 1), ("initial_tokens", 0), ("window", 1)):
            value = getattr(self, name)
            require(value >= least, f"IntervalAttention.{name} = {value} must be at least {least}")

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        return self

    def plan(
        self, tokens: Int[Array, "batch length"], document_start: Int[Array, "batch length"] | None
    ) -> IntervalPlan:
        first = jnp.zeros_like(tokens) if document_start is None else document_start
        token = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        position = token - first
        packed = pack((position < self.initial_tokens) | (position % self.interval == 0))
        # kept_before[t] kept tokens lie before token t, so a range of tokens [s, e) holds the
        # packed entries [kept_before[s], kept_before[e])
        kept_before = jnp.pad(packed.count, ((0, 0), (1, 0)))
        window_start = jnp.maximum(token - self.window + 1, 0)
        return IntervalPlan(
            packed=packed,
            start=jnp.take_along_axis(kept_before, first, axis=1),
            end=jnp.take_along_axis(kept_before, window_start, axis=1),
            document_start=document_start,
        )

    def sources(
        self,
        plan: IntervalPlan,
        heads: Heads,
        first_row: Int[Array, ""] | Int[Array, " batch"] | int,
    ) -> tuple[Source, Source]:
        kept = RangeSource(
            heads.keys,
            heads.values,
            start=take_rows(plan.start, first_row, heads.rows),
            end=take_rows(plan.end, first_row, heads.rows),
            packed=plan.packed,
        )
        recent = TokenSource(
            heads.keys,
            heads.values,
            document_start=take_rows(plan.document_start, first_row, heads.rows),
            window=self.window,
            row_offset=first_row,
        )
        return kept, recent
