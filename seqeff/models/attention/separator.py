"""Separator attention: initial tokens, separators and a window (SepLLM, section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqeff.checks import ConfigError, check_types, require
from seqeff.models.attention.protocol import take_rows
from seqeff_kernels.range_attention import (
    PackedIndices,
    RangeSource,
    Source,
    TokenSource,
    pack,
)

# The literal lists of the paper's code: training and streaming (the latter adds merged tokens).
PRESETS: dict[str, tuple[int, ...]] = {
    "pythia": (15, 13, 32, 2, 28, 27, 209, 186, 187),
    "pythia-streaming": (
        *(15, 13, 32, 2, 28, 27, 209, 186, 187),
        *(964, 1157, 3736, 2195, 3706, 1163, 2490, 50276, 586, 4928, 50275),
    ),
    "llama3": (13, 11, 30, 0, 26, 25, 198, 220, 128000),
    "llama3-streaming": (
        *(13, 11, 30, 0, 26, 25, 198, 220),
        *(662, 1174, 949, 758, 2652, 551, 720, 256, 262),
    ),
    "llama3-sepcache": (
        *(13, 11, 30, 0, 26, 25, 198, 220),
        *(662, 1174, 949, 758, 2652, 551, 720, 256, 262, 128000),
    ),
    "falcon": (25, 23, 42, 12, 38, 37, 193, 4610, 204, 258, 1212, 23787, 466),
}

_CHARACTERS = ".,?!;: \t\n"


class SeparatorPlan(NamedTuple):
    """Packed entries, and the range of them that each row attends beside its window."""

    packed: PackedIndices
    start: Int[Array, "batch length"]
    end: Int[Array, "batch length"]
    document_start: Int[Array, "batch length"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparatorAttention:
    r"""Row i attends j <= i where j is initial, a separator, or within the last `window` tokens.

    `window` counts the token itself. The first `initial_tokens` of each document are always
    visible (of each row, when documents are not kept apart). A separator is a token whose text
    ends with one of `characters`, so that merged tokens such as '.\n\n' count; `preset` names one
    of the paper's literal id lists instead, and `separator_ids` gives the ids outright. Without
    separators (`characters = ""`) this is StreamingLLM's mask.

    Source: SepLLM (arXiv 2412.12094), section 3.1; the lists are those of its published code.
    """

    window: int = 64
    initial_tokens: int = 3
    characters: str = _CHARACTERS
    preset: str | None = None
    separator_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.window >= 1,
            f"SeparatorAttention.window = {self.window} must be at least 1 (it counts the token)",
        )
        require(
            self.initial_tokens >= 0,
            f"SeparatorAttention.initial_tokens = {self.initial_tokens} must not be negative",
        )
        require(
            self.preset is None or self.preset in PRESETS,
            f"SeparatorAttention.preset = {self.preset!r} is not one of {', '.join(PRESETS)}",
        )
        require(
            min(self.separator_ids or (0,)) >= 0,
            f"SeparatorAttention.separator_ids = {self.separator_ids} must not be negative; "
            "give () for none",
        )

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        """This config with `separator_ids` set, from the preset or from the tokens' text.

        Raises:
          ConfigError: an id lies outside the vocabulary, no token ends with any character, or the
            preset's ids are mostly words here.
        """
        ids = self.separator_ids if self.preset is None else PRESETS[self.preset]
        if ids is None:
            endings = tuple(self.characters)
            ids = tuple(i for i, text in enumerate(vocabulary) if text.endswith(endings))
            require(
                bool(ids) or not self.characters,
                f"SeparatorAttention.characters = {self.characters!r}: no token of the tokenizer "
                "ends with any of them",
            )
        outside = [i for i in ids if not 0 <= i < len(vocabulary)]
        require(
            not outside,
            f"SeparatorAttention: separator ids {outside} lie outside the tokenizer's "
            f"{len(vocabulary)} tokens",
        )
        if self.preset is not None:
            # not all: some lists hold the token that begins a text
            fitting = sum(vocabulary[i].endswith(tuple(_CHARACTERS)) for i in ids)
            require(
                2 * fitting > len(ids),
                f"SeparatorAttention.preset = {self.preset!r} is for another tokenizer: {fitting} "
                f"of its {len(ids)} ids end with punctuation or white space in this one; leave "
                "preset null to find separators by their text",
            )
        return dataclasses.replace(self, separator_ids=ids)

    def plan(
        self, tokens: Int[Array, "batch length"], document_start: Int[Array, "batch length"] | None
    ) -> SeparatorPlan:
        if self.separator_ids is None:
            raise ConfigError(
                "SeparatorAttention.separator_ids is not set: bind it, or call for_vocabulary with "
                "the tokenizer's vocabulary"
            )
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        starts = jnp.zeros_like(tokens) if document_start is None else document_start
        table = np.zeros(max(self.separator_ids, default=0) + 1, bool)
        table[list(self.separator_ids)] = True
        kept = jnp.take(table, tokens, mode="fill", fill_value=False)
        packed = pack(kept | (positions - starts < self.initial_tokens))

        def kept_through(position: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
            counts = jnp.take_along_axis(packed.count, jnp.maximum(position, 0), axis=1)
            return jnp.where(position >= 0, counts, 0)

        return SeparatorPlan(
            packed=packed,
            start=kept_through(starts - 1),
            end=kept_through(positions - self.window),
            document_start=document_start,
        )

    def sources(
        self,
        plan: SeparatorPlan,
        keys: Float[Array, "batch length kv_heads head_dim"],
        values: Float[Array, "batch length kv_heads head_dim"],
        first_row: Int[Array, ""] | int,
        rows: int,
    ) -> tuple[Source, Source]:
        memory = RangeSource(
            keys,
            values,
            start=take_rows(plan.start, first_row, rows),
            end=take_rows(plan.end, first_row, rows),
            packed=plan.packed,
        )
        recent = TokenSource(
            keys,
            values,
            document_start=take_rows(plan.document_start, first_row, rows),
            window=self.window,
            row_offset=first_row,
        )
        return memory, recent
