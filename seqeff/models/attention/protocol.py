"""What a way of attending must say: which entries each row attends, as sources and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, overload, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from seqeff.models.heads import Heads
from seqeff_kernels.range_attention import Source


@runtime_checkable
class Attention(Protocol):
    """Config of an attention. A new one is a frozen dataclass with these three methods.

    Nothing else has to know it: a gin file imports its module and binds
    `TransformerConfig.attention = @MyAttention()`. One that can decode from fewer entries than all
    also has the method `cache` of `caches.CachedAttention`; what else it may tell of itself is in
    `MeasuredAttention` and `NamedStream`.
    """

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        """This config, knowing the decoded text of every token id; most return themselves."""
        ...

    def plan(
        self, tokens: Int[Array, "batch length"], document_start: Int[Array, "batch length"] | None
    ) -> Any:
        """A pytree of what follows from the tokens alone, made once a step for all layers.

        `document_start` is the row index of the first token of each token's document; None means
        that documents are not kept apart, and every row begins at 0.
        """
        ...

    def sources(
        self, plan: Any, heads: Heads, first_row: Int[Array, ""] | Int[Array, " batch"] | int
    ) -> Sequence[Source]:
        """The sources that tokens [first_row, first_row + rows) attend, in one softmax.

        Training asks for all rows at once; decoding for the few that are new, of which each row of
        the batch may have its own first. `length` is that of the plan. No row may see an entry made
        from a later token.
        """
        ...


@runtime_checkable
class MeasuredAttention(Protocol):
    """An attention of which is known, without a model, how much it attends and how far."""

    def attended(self, length: int, density: float) -> Float[np.ndarray, " length"]:
        """Entries that each of the first `length` rows attends, in the mean over texts.

        Args:
          density: the fraction of tokens that are separators by their text or id.
        """
        ...

    def farthest(self, length: int) -> int:
        """The largest distance in positions, itself counted, that a row of so many tokens sees."""
        ...


@runtime_checkable
class NamedStream(Protocol):
    """An attention that a paper has read endless texts with, beside which StreamingLLM is read."""

    @property
    def stream_name(self) -> str:
        """The paper's."""
        ...

    def as_streaming_llm(self) -> Self:
        """StreamingLLM of as many entries; one that is StreamingLLM returns itself."""
        ...


@overload
def take_rows(bounds: None, first_row: Any, rows: int) -> None: ...


@overload
def take_rows(
    bounds: Int[Array, "batch length"], first_row: Any, rows: int
) -> Int[Array, "batch rows"]: ...


def take_rows(
    bounds: Int[Array, "batch length"] | None,
    first_row: Int[Array, ""] | Int[Array, " batch"] | int,
    rows: int,
) -> Int[Array, "batch rows"] | None:
    """The rows [first_row, first_row + rows) of a bound; all of them without a copy."""
    if bounds is None or bounds.shape[1] == rows:
        return bounds
    if isinstance(first_row, jax.Array) and first_row.ndim:
        take = jax.vmap(lambda line, first: jax.lax.dynamic_slice_in_dim(line, first, rows))
        return take(bounds, first_row)
    return jax.lax.dynamic_slice_in_dim(bounds, first_row, rows, axis=1)
