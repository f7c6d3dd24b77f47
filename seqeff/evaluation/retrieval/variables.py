"""Variables that take their value from each other, far apart in a long text."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Sequence

from seqeff.checks import check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Asked, Example, compose
from seqeff.evaluation.retrieval.haystack import Filler, hide, new, number, words_of

# of filler in a short text
_SHOT_WORDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking:
    """Variable tracking of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.2).

    A chain begins with a variable that is given a number; each further one is given what the one
    before it holds. The question asks for all variables that hold the first chain's number. The
    defaults are those of the published code.

    Attributes:
      chains: of which the others distract.
      hops: further variables of a chain.
      shots: short texts before it, with their answers.
    """

    chains: int = 1
    hops: int = 4
    shots: int = 1
    filler: Filler = Filler()

    has_depth = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.chains >= 1, f"VariableTracking.chains = {self.chains} must be at least 1")
        require(self.hops >= 0, f"VariableTracking.hops = {self.hops} must not be negative")
        require(self.shots >= 0, f"VariableTracking.shots = {self.shots} must not be negative")

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words = self.filler.words(choose, length)
        taken = set(words_of(" ".join(words)))
        before = ""
        for _ in range(self.shots):
            statements, asked = self._chains(choose, 3, taken)
            short = _text(self.filler.words(choose, _SHOT_WORDS), statements)
            before += f"{short}{asked.solved}\n\n"
        statements, asked = self._chains(choose, 5, taken)

        def context(count: int) -> str:
            return before + _text(words[:count], statements)

        return compose(tokenizer, length, context, [asked])

    def _chains(
        self, choose: random.Random, letters: int, taken: set[str]
    ) -> tuple[list[tuple[float, str]], Asked]:
        """Statements at their depths, and the question; variables have so many letters."""

        def name() -> str:
            return "".join(choose.choices(string.ascii_uppercase, k=letters))

        statements: list[tuple[float, str]] = []
        chains: list[tuple[str, list[str]]] = []
        for _ in range(self.chains):
            held = value = new(lambda: number(choose, 5), taken)
            names = [new(name, taken) for _ in range(1 + self.hops)]
            for place, variable in zip(sorted(choose.random() for _ in names), names, strict=True):
                statements.append((place, f"Let {variable} = {held}."))
                held = variable
            chains.append((value, names))
        statements.sort(key=lambda statement: statement[0])
        value, names = chains[0]
        text = (
            f"Question: which variables, {len(names)} in all, have the value {value}?\n"
            "Answer: the variables are"
        )
        return statements, Asked(text, tuple(names), None)


def _text(words: Sequence[str], statements: Sequence[tuple[float, str]]) -> str:
    text = hide(words, statements)
    return f"This text gives values to variables, which are needed later.\n{text}\n"
