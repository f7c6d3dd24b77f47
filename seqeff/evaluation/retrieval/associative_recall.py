"""Multi-query associative recall: pairs of tokens, and later their first ones again."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np

from seqeff.checks import UserError, check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall:
    """MQAR of Arora et al. 2023 ("Zoology", arXiv 2312.04927), with the published code's defaults.

    After the end of text stand the pairs, a key and its value each, then every key once more, at
    even distances from the pairs that follow a power law. What stands between is random, but, other
    than in the published rows, neither a key nor a value, so that every question has one answer.

    Attributes:
      pairs: in a row.
      power: the probability of a distance is in proportion to it to the power of this less 1; the
        first pairs' are drawn first.
    """

    pairs: int = 8
    power: float = 0.01

    has_depth = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.pairs >= 1, f"AssociativeRecall.pairs = {self.pairs} must be at least 1")
        require(self.power > 0, f"AssociativeRecall.power = {self.power} must be above 0")

    def make(self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random) -> Row:
        """A row of exactly `length` tokens; see `Task.make`.

        Raises:
          UserError: the row, or the vocabulary, is too small for the pairs.
        """
        pairs, needed = self.pairs, 1 + 4 * self.pairs
        if length < needed:
            raise UserError(
                f"{length} tokens are too few: {pairs} pairs and their questions take {needed}; "
                "give longer --lengths"
            )
        ids = np.flatnonzero(tokenizer.byte_lengths().inside).tolist()
        if len(ids) <= 2 * pairs:
            raise UserError(
                f"AssociativeRecall.pairs = {pairs} needs more than {2 * pairs} tokens with text; "
                f"the tokenizer has {len(ids)}"
            )
        choose.shuffle(ids)
        keys, values, others = ids[:pairs], ids[pairs : 2 * pairs], ids[2 * pairs :]
        tokens = np.array(choose.choices(others, k=length), np.int32)
        begin = 1 + 2 * pairs
        tokens[0] = tokenizer.begin_of_text
        tokens[1:begin:2], tokens[2:begin:2] = keys, values
        places = begin + 2 * np.array(self._distances((length - begin) // 2, choose), np.int32)
        tokens[places] = keys
        return Row(tokens, places, np.array(values, np.int32))

    def _distances(self, count: int, choose: random.Random) -> list[int]:
        """As many as there are pairs, of those below `count`, each at most once."""
        # the largest of u^(1/weight) are a weighted draw without replacement
        scores = {
            index: math.log(1 - choose.random()) / (index + 1) ** (self.power - 1)
            for index in range(count)
        }
        return sorted(scores, key=scores.__getitem__, reverse=True)[: self.pairs]
