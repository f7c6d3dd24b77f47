"""Separator attention: initial tokens, separators and a window (SepLLM, section 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqeff.checks import ConfigError, check_types, require
from seqeff.models import separator_tokens
from seqeff.models.attention.protocol import take_rows
from seqeff.models.caches import BlockCache, CacheKind, PublishedCache
from seqeff.models.heads import Heads
from seqeff_kernels.range_attention import (
    PackedIndices,
    RangeSource,
    Source,
    TokenSource,
    pack,
)


class Kept(NamedTuple):
    """A packed list of tokens, and the range of it that each row attends.

    Attributes:
      keys_turn: by how many positions each token's key is turned to its rank in the list; None
        where tokens keep their own positions.
      queries_turn: by how many each row's query is turned to see the list at its ranks.
    """

    packed: PackedIndices
    start: Int[Array, "batch length"]
    end: Int[Array, "batch length"]
    keys_turn: Int[Array, "batch length"] | None = None
    queries_turn: Int[Array, "batch length"] | None = None


class SeparatorPlan(NamedTuple):
    """The lists that rows attend beside their window."""

    kept: tuple[Kept, ...]
    document_start: Int[Array, "batch length"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparatorAttention:
    r"""Row i attends j <= i where j is initial, a separator, or within the last `window` tokens.

    A separator is a token whose text ends with one of `characters`, so that merged tokens such as
    '.\n\n' count; `preset` names one of the paper's literal id lists instead, and `separator_ids`
    gives the ids outright. Without separators (`characters = ""`) this is StreamingLLM's mask, and
    with `interval` in their place it is FixLLM's.

    Attributes:
      window: nearest tokens that a token attends, itself included.
      initial_tokens: first tokens that every later one attends.
      initial_of: of each "document", or of the "row" alone, whose padding on the left is not
        counted. The same where documents are not kept apart.
      separators: how many of the latest separators that have left the window are attended; null:
        all. With a number, cost is linear in length, and so is decoding in constant memory.
      interval: every so many tokens of a document, from its first, one counts as a separator.
      positions: "absolute": tokens keep their own. "compact": initial tokens and separators take
        the positions right before the window, in their order, so that no distance exceeds the
        number of attended entries (the position shift of StreamingLLM and SepLLM, section 3.3).
      cache_entries: decode with the published cache of so many entries, of which the window's grow
        from `window` on until all are full; null: with exactly what is attended over whole rows.

    Source: SepLLM (arXiv 2412.12094), sections 3.1 and 3.3; the lists are those of its published
    code.
    """

    window: int = 64
    initial_tokens: int = 3
    initial_of: Literal["document", "row"] = "document"
    separators: int | None = None
    characters: str = separator_tokens.CHARACTERS
    preset: str | None = None
    separator_ids: tuple[int, ...] | None = None
    interval: int | None = None
    positions: Literal["absolute", "compact"] = "absolute"
    cache_entries: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        name = type(self).__name__
        require(
            self.window >= 1,
            f"{name}.window = {self.window} must be at least 1 (it counts the token)",
        )
        require(
            self.initial_tokens >= 0,
            f"{name}.initial_tokens = {self.initial_tokens} must not be negative",
        )
        require(
            self.separators is None or self.separators >= 1,
            f"{name}.separators = {self.separators} must be at least 1, or null for all; without "
            'any, characters = ""',
        )
        require(
            self.interval is None or self.interval >= 1,
            f"{name}.interval = {self.interval} must be at least 1, or null",
        )
        separator_tokens.check(name, self.preset, self.separator_ids)
        if self.cache_entries is not None:
            self._check_cache(name, self.cache_entries)

    def _check_cache(self, name: str, entries: int) -> None:
        require(
            self.separators is not None or not self.might_keep,
            f"{name}.cache_entries = {entries} needs a number for {name}.separators, or none to "
            'keep: characters = ""',
        )
        parts = (self.initial_tokens, self.separators or 0, self.window)
        require(
            sum(parts) <= entries,
            f"{name}.cache_entries = {entries} is below initial_tokens + separators + window = "
            f"{' + '.join(map(str, parts))} = {sum(parts)}",
        )

    @property
    def might_keep(self) -> bool:
        """Whether tokens can be separators, as far as is known without a vocabulary."""
        listed = self.preset is not None or bool(self.separator_ids)
        found = self.separator_ids is None and bool(self.characters)
        return self.interval is not None or listed or found

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        """This config with `separator_ids` set, from the preset or from the tokens' text.

        Raises:
          ConfigError: see `separator_tokens.find`.
        """
        ids = separator_tokens.find(
            type(self).__name__, vocabulary, self.characters, self.preset, self.separator_ids
        )
        return dataclasses.replace(self, separator_ids=ids, preset=None)

    @property
    def known_ids(self) -> tuple[int, ...]:
        """The separators' ids.

        Raises:
          ConfigError: they are not set.
        """
        if self.separator_ids is None:
            raise ConfigError(
                "SeparatorAttention.separator_ids is not set: bind it, or call for_vocabulary with "
                "the tokenizer's vocabulary"
            )
        return self.separator_ids

    def are_separators(
        self, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"]
    ) -> Bool[Array, "batch length"]:
        """Which tokens are; the first of them may be initial too. Positions: in the document."""
        found = separator_tokens.are_separators(self.known_ids, tokens)
        return found if self.interval is None else found | (positions % self.interval == 0)

    def plan(
        self, tokens: Int[Array, "batch length"], document_start: Int[Array, "batch length"] | None
    ) -> SeparatorPlan:
        token = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        starts = jnp.zeros_like(tokens) if document_start is None else document_start
        positions = token - starts
        real = positions >= 0
        separators = self.are_separators(tokens, positions) & real
        counted_from = starts if self.initial_of == "document" else starts[:, :1]
        initial = (token - counted_from < self.initial_tokens) & real & (token >= counted_from)
        if self.separators is None:
            masks = {"all": initial | separators}
        else:
            masks = {"initial": initial, "separators": separators & ~initial}
        if not self.might_keep:
            masks = {"initial": initial}
        if self.initial_tokens == 0:
            masks.pop("initial", None)
        lists = []
        for kind, mask in masks.items():
            # else each document of a row has its own
            once = document_start is None or self.initial_of == "row"
            packed = pack(mask, self.initial_tokens if kind == "initial" and once else None)
            start = _through(packed, starts - 1)
            end = _through(packed, token - self.window)
            if kind == "separators" and self.separators is not None:
                start = jnp.maximum(start, end - self.separators)
            lists.append(Kept(packed, start, end))
        if self.positions == "compact":
            lists = self._compact(lists, positions, ranked="initial" not in masks)
        return SeparatorPlan(tuple(lists), document_start)

    def sources(
        self,
        plan: SeparatorPlan,
        heads: Heads,
        first_row: Int[Array, ""] | Int[Array, " batch"] | int,
    ) -> tuple[Source, ...]:
        made: list[Source] = []
        for kept in plan.kept:
            keys, queries = heads.keys, None
            if kept.keys_turn is not None:
                keys = heads.turned(keys, kept.keys_turn)
            if kept.queries_turn is not None:
                by = take_rows(kept.queries_turn, first_row, heads.rows)
                queries = heads.turned(heads.queries, by)
            made.append(
                RangeSource(
                    keys,
                    heads.values,
                    start=take_rows(kept.start, first_row, heads.rows),
                    end=take_rows(kept.end, first_row, heads.rows),
                    queries=queries,
                    packed=kept.packed,
                )
            )
        recent = TokenSource(
            heads.keys,
            heads.values,
            document_start=take_rows(plan.document_start, first_row, heads.rows),
            window=self.window,
            row_offset=first_row,
        )
        return (*made, recent)

    def cache(self) -> CacheKind:
        """Rings of the separators and of the window, or the published cache."""
        compact = self.positions == "compact"
        ring = self.separators if self.might_keep else 0
        if self.cache_entries is None:
            return BlockCache(self.window, self.initial_tokens, ring, self, compact)
        return PublishedCache(
            local=self.window,
            initial=self.initial_tokens,
            separators=ring or 0,
            entries_limit=self.cache_entries,
            chooser=self,
            compact=compact,
        )

    def attended(self, length: int, density: float) -> Float[np.ndarray, " length"]:
        """Those of the window, the initial tokens before it, and the separators between these two.

        Separators are independent; those of an `interval` come on top of the density.
        """
        row = np.arange(length)
        before = np.maximum(row + 1 - self.window, 0)
        initial = np.minimum(before, self.initial_tokens)
        between = before - initial
        density = density if dataclasses.replace(self, interval=None).might_keep else 0.0
        if self.interval is not None:
            density = 1 - (1 - density) * (1 - 1 / self.interval)
        kept = density * between
        if self.separators is not None:
            kept = _expected_minimum(length, density, self.separators)[between]
        return np.minimum(row + 1, self.window) + initial + kept

    def farthest(self, length: int) -> int:
        if not self.initial_tokens and not self.might_keep:
            return min(self.window, length)
        if self.positions == "absolute":
            return length
        kept = (self.separators or length) if self.might_keep else 0
        return min(self.cache_entries or self.initial_tokens + kept + self.window, length)

    @property
    def stream_name(self) -> str:
        if not self.might_keep:
            return "StreamingLLM"
        # what is kept without separators is kept by interval
        return "SepLLM" if dataclasses.replace(self, interval=None).might_keep else "FixLLM"

    def as_streaming_llm(self) -> Self:
        """The window takes the separators' place."""
        if not self.might_keep:
            return self
        window = self.window + (self.separators or 0)
        if self.cache_entries is not None:
            window = self.cache_entries - self.initial_tokens
        without = {"separators": None, "separator_ids": (), "characters": "", "preset": None}
        return dataclasses.replace(self, window=window, interval=None, **without)

    def _compact(
        self, lists: Sequence[Kept], positions: Int[Array, "batch length"], ranked: bool
    ) -> list[Kept]:
        """Turns that put the lists one after another, right before the window.

        A list of initial tokens alone, the first unless all are `ranked`, has its own already.
        """
        placed = []
        # entries between a list's last visible one and the query
        between = jnp.minimum(self.window, positions + 1) - 1
        for index, kept in reversed(list(enumerate(lists))):
            visible = jnp.maximum(kept.end - kept.start, 0)
            if index == 0 and not ranked:
                placed.append(kept._replace(queries_turn=visible + between - positions))
                continue
            placed.append(
                kept._replace(
                    keys_turn=kept.packed.count - 1 - positions,
                    queries_turn=kept.end + between - positions,
                )
            )
            between = between + visible
        return placed[::-1]


def _expected_minimum(most: int, density: float, limit: int) -> Float[np.ndarray, " counts"]:
    """The mean of `min(limit, separators)` among 0, 1, ..., `most` tokens that are independent."""
    fewer = np.zeros(limit)  # the chance of 0, 1, ..., limit - 1 separators so far
    fewer[0] = 1.0
    means = np.zeros(most + 1)
    for count in range(1, most + 1):
        # one more token adds a separator that counts, where there were fewer than the limit
        means[count] = means[count - 1] + density * fewer.sum()
        fewer[1:] = fewer[1:] * (1 - density) + fewer[:-1] * density
        fewer[0] *= 1 - density
    return means


def _through(
    packed: PackedIndices, token: Int[Array, "batch length"]
) -> Int[Array, "batch length"]:
    """How many packed tokens are at or before a token; 0 before the first."""
    counts = jnp.take_along_axis(packed.count, jnp.maximum(token, 0), axis=1)
    return jnp.where(token >= 0, counts, 0)
