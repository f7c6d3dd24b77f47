"""Long lists of invented words, some of which come more often than the others."""

from __future__ import annotations

import dataclasses
import math
import random

from seqeff.checks import check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Asked, Example, compose
from seqeff.evaluation.retrieval.haystack import invented_word, new


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords:
    """Common words extraction of RULER (Hsieh et al. 2024, section 3, "Aggregation").

    The rare words of the list are as many as fit.

    Attributes:
      common: words that are asked for.
      often: how many times each of them comes.
      seldom: how many times each other one does.
    """

    common: int = 10
    often: int = 30
    seldom: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        require(self.common >= 1, f"CommonWords.common = {self.common} must be at least 1")
        require(self.seldom >= 1, f"CommonWords.seldom = {self.seldom} must be at least 1")
        require(
            self.often > self.seldom,
            f"CommonWords.often = {self.often} must be above CommonWords.seldom = {self.seldom}",
        )

    @property
    def has_depth(self) -> bool:
        return False

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words = _Words(choose)

        def context(count: int) -> str:
            # a unit is one more of the list's words
            rare, more = divmod(count, self.seldom)
            counts = [self.often] * self.common + [self.seldom] * rare + [more] * (more > 0)
            return words.shuffled(counts)

        return compose(tokenizer, length, context, [words.asked(self.common)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """Frequent words extraction of RULER (Hsieh et al. 2024, section 3, "Aggregation").

    How often words come is in proportion to their rank to the power of `-exponent`.

    Attributes:
      top: most frequent words, which are asked for.
      words: of the list that differ.
    """

    top: int = 3
    words: int = 100
    exponent: float = 2.0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.top >= 1, f"FrequentWords.top = {self.top} must be at least 1")
        require(
            self.words > self.top,
            f"FrequentWords.words = {self.words} must be above FrequentWords.top = {self.top}",
        )
        require(self.exponent > 0, f"FrequentWords.exponent = {self.exponent} must be above 0")

    @property
    def has_depth(self) -> bool:
        return False

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words = _Words(choose)
        shares = [rank**-self.exponent for rank in range(1, self.words + 1)]
        # from so many on, the last that is asked for comes more often than the next
        least = math.ceil(1 / (shares[self.top - 1] - shares[self.top]))

        def context(count: int) -> str:
            return words.shuffled([math.floor(share * count) for share in shares])

        return compose(tokenizer, length, context, [words.asked(self.top)], least)


class _Words:
    """Invented words, as many as are called for, in an order that a number decides."""

    def __init__(self, choose: random.Random) -> None:
        self._seed, self._choose = choose.getrandbits(64), random.Random(choose.getrandbits(64))
        self._words: list[str] = []
        self._taken: set[str] = set()

    def shuffled(self, counts: list[int]) -> str:
        """A text with the first words so many times each."""
        self._draw(len(counts))
        repeated = [
            word for word, count in zip(self._words, counts, strict=False) for _ in range(count)
        ]
        random.Random(self._seed).shuffle(repeated)
        return f"A list of words, of which some come often:\n{' '.join(repeated)}\n"

    def asked(self, count: int) -> Asked:
        """The question for the first words."""
        self._draw(count)
        text = f"Question: which {count} words come most often?\nAnswer: the words are"
        return Asked(text, tuple(self._words[:count]), None)

    def _draw(self, count: int) -> None:
        while len(self._words) < count:
            self._words.append(new(lambda: invented_word(self._choose), self._taken))
