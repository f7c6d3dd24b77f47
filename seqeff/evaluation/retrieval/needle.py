"""A fact in a long text that has nothing to do with it."""

from __future__ import annotations

import dataclasses
import random

from seqeff.checks import check_types
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Asked, Example, compose
from seqeff.evaluation.retrieval.haystack import Filler, hide, new, words_of

TOWNS = ("Arvel", "Corrin", "Dunmere", "Estrand", "Hollin", "Marwick", "Ostrey", "Tavenna")
THINGS = (
    "almonds", "buttons", "cardamom", "chestnuts", "cinnamon", "coins", "feathers", "ginger",
    "lavender", "marbles", "mustard", "olives", "pearls", "pepper", "saffron", "shells", "tobacco",
    "vanilla",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
    """The needle in a haystack of Kamradt 2023 ("LLMTest_NeedleInAHaystack"), of changing facts."""

    filler: Filler = Filler()

    has_depth = True

    def __post_init__(self) -> None:
        check_types(self)

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        words, town = self.filler.words(choose, length), choose.choice(TOWNS)
        thing = new(lambda: choose.choice(THINGS), set(words_of(" ".join(words))))
        needle = f"The lighthouse keeper of {town} keeps a box of {thing} under the stairs."

        def context(count: int) -> str:
            return hide(words[:count], [(depth, needle)]) + "\n"

        text = (
            f"Question: what does the lighthouse keeper of {town} keep under the stairs?\n"
            "Answer: a box of"
        )
        return compose(tokenizer, length, context, [Asked(text, (thing,), depth)])
