"""Numbers of invented things in a long text: one among others, or several at once."""

from __future__ import annotations

import dataclasses
import random

from seqeff.checks import check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Asked, Example, compose
from seqeff.evaluation.retrieval.haystack import (
    Filler,
    hide,
    invented_word,
    new,
    number,
    words_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiNeedle:
    """The needles of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.1).

    Needles stand at random depths, but for the one asked for where it is the only one. Keys are
    invented words; the numbers of needles are those of the published configs.

    Attributes:
      keys: that have numbers; those not asked for distract.
      values: numbers of a key, all asked for.
      queries: keys that are asked for in one question.
      digits: of a number.
      filler: null: needles of further keys (the paper's multi-keys 2 and 3).
    """

    keys: int = 1
    values: int = 1
    queries: int = 1
    digits: int = 7
    filler: Filler | None = Filler()

    def __post_init__(self) -> None:
        check_types(self)
        own = type(self).__name__
        for name in ("values", "queries", "digits"):
            value = getattr(self, name)
            require(value >= 1, f"{own}.{name} = {value} must be at least 1")
        require(
            self.keys >= self.queries,
            f"{own}.keys = {self.keys} must be at least the {self.queries} of {own}.queries",
        )

    @property
    def has_depth(self) -> bool:
        return self.queries * self.values == 1

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        taken: set[str] = set()
        words = self._words(choose, length, taken)
        taken.update(words_of(" ".join(words)))
        keys = [new(lambda: invented_word(choose), taken) for _ in range(self.keys)]
        wanted: list[tuple[float, str]] = []
        needles = []
        for index, key in enumerate(keys):
            for _ in range(self.values):
                value = new(lambda: number(choose, self.digits), taken)
                asked_for = index < self.queries
                place = depth if self.has_depth and asked_for else choose.random()
                needles.append((place, _needle(key, value)))
                wanted += [(place, value)] * asked_for
        needles.sort(key=lambda needle: needle[0])
        wanted.sort(key=lambda needle: needle[0])

        def context(count: int) -> str:
            text = hide(words[:count], needles)
            return f"This text gives numbers of things, which are needed later.\n{text}\n"

        named = " and the ".join(keys[: self.queries])
        text = f"Question: what is the number of the {named}?\nAnswer: the number is"
        if len(wanted) > 1:
            text = f"Question: what are all the numbers of the {named}?\nAnswer: the numbers are"
        answers = tuple(value for _, value in wanted)
        asked = Asked(text, answers, depth if self.has_depth else None)
        return compose(tokenizer, length, context, [asked])

    def _words(self, choose: random.Random, count: int, taken: set[str]) -> list[str]:
        if self.filler is not None:
            return self.filler.words(choose, count)
        words: list[str] = []
        while len(words) < count:
            key = new(lambda: invented_word(choose), taken)
            words += _needle(key, number(choose, self.digits)).split()
        return words[:count]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiKey(MultiNeedle):
    """One needle among others."""

    keys: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyHaystack(MultiNeedle):
    """One needle among needles alone."""

    filler: Filler | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiValue(MultiNeedle):
    """Several numbers of one key."""

    values: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiQuery(MultiNeedle):
    """Several keys, all asked for."""

    keys: int = 4
    queries: int = 4


def _needle(key: str, value: str) -> str:
    return f"The number of the {key} is {value}."
