"""A number in a long text of no importance, asked for at its end."""

from __future__ import annotations

import dataclasses
import random

from seqeff.checks import check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Asked, Example, compose
from seqeff.evaluation.retrieval.haystack import Filler, hide, new, number, words_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey:
    """The pass key of Mohtashami and Jaggi 2023 ("Landmark Attention", arXiv 2305.16300).

    Attributes:
      digits: of the key; the paper's has up to five.
    """

    digits: int = 5
    filler: Filler = Filler()

    has_depth = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self.digits >= 1, f"Passkey.digits = {self.digits} must be at least 1")

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words = self.filler.words(choose, length)
        key = new(lambda: number(choose, self.digits), set(words_of(" ".join(words))))
        needle = f"The pass key is {key}. Note it down: {key} is the pass key."

        def context(count: int) -> str:
            text = hide(words[:count], [(depth, needle)])
            return f"One sentence of this text gives a pass key, which is needed later.\n{text}\n"

        asked = Asked("Question: what is the pass key?\nAnswer: the pass key is", (key,), depth)
        return compose(tokenizer, length, context, [asked])
