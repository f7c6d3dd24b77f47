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
    """The needles of RULER (Hsieh et al. 2024, section 3, "Retrieval").

    Attributes:
      keys: that have numbers; those not asked for distract ("multi-keys").
      values: numbers of a key, all asked for ("multi-values").
      queries: keys that are asked for in one question ("multi-queries").
      digits: of a number.

    Needles stand at random depths, but for the one asked for where it is the only one.
    """

    keys: int = 1
    values: int = 1
    queries: int = 1
    digits: int = 7
    filler: Filler = Filler()

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("values", "queries", "digits"):
            value = getattr(self, name)
            require(value >= 1, f"MultiNeedle.{name} = {value} must be at least 1")
        require(
            self.keys >= self.queries,
            f"MultiNeedle.keys = {self.keys} must be at least the {self.queries} of "
            "MultiNeedle.queries",
        )

    @property
    def has_depth(self) -> bool:
        return self.queries * self.values == 1

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words = self.filler.words(choose, length)
        taken = set(words_of(" ".join(words)))
        keys = [new(lambda: invented_word(choose), taken) for _ in range(self.keys)]
        wanted: list[tuple[float, str]] = []
        needles = []
        for index, key in enumerate(keys):
            for _ in range(self.values):
                value = new(lambda: number(choose, self.digits), taken)
                asked_for = index < self.queries
                place = depth if self.has_depth and asked_for else choose.random()
                needles.append((place, f"The number of the {key} is {value}."))
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
