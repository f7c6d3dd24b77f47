"""Pairs of keys and values, and many questions after them."""

from __future__ import annotations

import dataclasses
import random

from seqeff.checks import check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Asked, Example, compose
from seqeff.evaluation.retrieval.haystack import new


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValue:
    """Key-value retrieval of Liu et al. 2023 ("Lost in the Middle", arXiv 2307.03172, section 3).

    The context holds as many pairs as fit. Each question follows it directly, as if there were no
    other, and asks for one of the pairs that stand at even depths, in an order of no meaning.

    Attributes:
      questions: after one context; the paper asks one.
      characters: hexadecimal, of a key and of a value; the paper's UUIDs have 32.
    """

    questions: int = 11
    characters: int = 32

    has_depth = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.questions >= 1, f"KeyValue.questions = {self.questions} must be at least 1")
        require(self.characters >= 4, f"KeyValue.characters = {self.characters} must be at least 4")

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example:
        """See `Task.make`."""
        taken: set[str] = set()

        def draw() -> str:
            return f"{choose.getrandbits(4 * self.characters):0{self.characters}x}"

        def pair() -> tuple[str, str]:
            return new(draw, taken), new(draw, taken)

        wanted = [pair() for _ in range(self.questions)]
        depths = [index / max(self.questions - 1, 1) for index in range(self.questions)]
        others: list[str] = []

        def context(count: int) -> str:
            while len(others) < count:
                others.append(_line(*pair()))
            lines, begin = ["Keys and their values, a pair a line."], 0
            for place, one in zip(depths, wanted, strict=True):
                end = round(place * count)
                lines += [*others[begin:end], _line(*one)]
                begin = end
            return "\n".join([*lines, *others[begin:count], ""])

        asked = [
            Asked(
                f"Question: which value has the key {key}?\nAnswer: the value is",
                (value,),
                round(place, 3),
            )
            for (key, value), place in zip(wanted, depths, strict=True)
        ]
        choose.shuffle(asked)
        return compose(tokenizer, length, context, asked)


def _line(key: str, value: str) -> str:
    return f"key {key}: value {value}"
