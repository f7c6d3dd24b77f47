"""Long lists of invented words, some of which come more often than the others."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

from seqeff.checks import check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Asked, Example, compose
from seqeff.evaluation.retrieval.haystack import invented_word, new

# RULER's counts of common and of other words, from so many tokens on and below
_LONG, _COUNTS, _SHORT_COUNTS = 4096, (30, 3), (6, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords:
    """Common words extraction of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.3).

    The rare words of the numbered list are as many as fit. Words are invented; the defaults are
    those of the published code.

    Attributes:
      common: words that are asked for.
      often: how many times each of them comes; null: 30, and 6 below 4096 tokens.
      seldom: how many times each other one does; null: 3, and 1 below 4096 tokens.
      shots: shorter lists before it, with their answers.
    """

    common: int = 10
    often: int | None = None
    seldom: int | None = None
    shots: int = 1

    has_depth = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.common >= 1, f"CommonWords.common = {self.common} must be at least 1")
        require(self.shots >= 0, f"CommonWords.shots = {self.shots} must not be negative")
        for length in (_LONG, _LONG - 1):
            often, seldom = self._counts(length)
            require(seldom >= 1, f"CommonWords.seldom = {seldom} must be at least 1")
            require(
                often > seldom,
                f"CommonWords.often = {often} must be above CommonWords.seldom = {seldom}",
            )

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words, (often, seldom) = _Words(choose), self._counts(length)
        # the published ones: 40 words, 10 or 3 times, and 20 words, 3 times or once
        rare, counts = (30, (10, 3)) if length >= _LONG else (10, (3, 1))
        before = ""
        for _ in range(self.shots):
            shot = _Words(choose)
            many, few = [counts[0]] * self.common, [counts[1]] * rare
            asked = shot.asked(self.common)
            before += f"{_numbered(shot.shuffled(many + few))}{asked.solved}\n\n"

        def context(count: int) -> str:
            # a unit is one more of the list's words
            whole, more = divmod(count, seldom)
            counts = [often] * self.common + [seldom] * whole + [more] * (more > 0)
            return before + _numbered(words.shuffled(counts))

        return compose(tokenizer, length, context, [words.asked(self.common)])

    def _counts(self, length: int) -> tuple[int, int]:
        often, seldom = _COUNTS if length >= _LONG else _SHORT_COUNTS
        return (
            often if self.often is None else self.often,
            seldom if self.seldom is None else self.seldom,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """Frequent words extraction of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.3).

    How often words come is in proportion to their rank to the power of `-exponent`; in place of the
    first stand dots, which are not asked for. The list has all words that come at all.

    Attributes:
      top: most frequent words, which are asked for.
    """

    top: int = 3
    exponent: float = 2.0

    has_depth = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.top >= 1, f"FrequentWords.top = {self.top} must be at least 1")
        require(self.exponent > 0, f"FrequentWords.exponent = {self.exponent} must be above 0")

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words = _Words(choose)

        def share(rank: int) -> float:
            return rank**-self.exponent

        # from so many on, the last that is asked for comes more often than the next
        least = math.ceil(1 / (share(self.top + 1) - share(self.top + 2)))

        def context(count: int) -> str:
            counts = itertools.takewhile(
                bool, (math.floor(share(rank) * count) for rank in itertools.count(2))
            )
            text = " ".join(words.shuffled([*counts], dots=count))
            return f"A list of words, of which some come often, and of dots:\n{text}\n"

        return compose(tokenizer, length, context, [words.asked(self.top)], least)


class _Words:
    """Invented words, as many as are called for, in an order that a number decides."""

    def __init__(self, choose: random.Random) -> None:
        self._seed, self._choose = choose.getrandbits(64), random.Random(choose.getrandbits(64))
        self._words: list[str] = []
        self._taken: set[str] = set()

    def shuffled(self, counts: list[int], dots: int = 0) -> list[str]:
        """The first words so many times each, and dots."""
        self._draw(len(counts))
        repeated = [
            word for word, count in zip(self._words, counts, strict=False) for _ in range(count)
        ]
        repeated += ["..."] * dots
        random.Random(self._seed).shuffle(repeated)
        return repeated

    def asked(self, count: int) -> Asked:
        """The question for the first words."""
        self._draw(count)
        text = f"Question: which {count} words come most often?\nAnswer: the words are"
        return Asked(text, tuple(self._words[:count]), None)

    def _draw(self, count: int) -> None:
        while len(self._words) < count:
            self._words.append(new(lambda: invented_word(self._choose), self._taken))


def _numbered(words: list[str]) -> str:
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    return f"A numbered list of words, of which some come often:\n{numbered}\n"
