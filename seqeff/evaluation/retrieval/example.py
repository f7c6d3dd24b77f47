"""What a retrieval task makes: a context with questions, or a row whose answers stand in it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from seqeff.checks import UserError
from seqeff.data import Tokenizer

# tokens an answer may take beyond its own: it has to be seen to end
_SPARE = 4


class Question(NamedTuple):
    """What is asked after a context.

    Attributes:
      tokens: of its text.
      answers: words, each once, in the order of the text.
      wanted: tokens that the continuation may have.
      depth: where in the context the answer stands, from 0 to 1; None: in several places.
    """

    tokens: Int32[np.ndarray, " question"]
    answers: tuple[str, ...]
    wanted: int
    depth: float | None


class Example(NamedTuple):
    """A context, and questions of which each follows it directly.

    Attributes:
      context: tokens, from the one that begins a text.
    """

    context: Int32[np.ndarray, " context"]
    questions: tuple[Question, ...]


class Row(NamedTuple):
    """Tokens among which are the questions, to be answered by the next token's prediction.

    Attributes:
      places: of the questions' last tokens.
      targets: the answers: the tokens that should be predicted there.
    """

    tokens: Int32[np.ndarray, " length"]
    places: Int32[np.ndarray, " questions"]
    targets: Int32[np.ndarray, " questions"]


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass of a task's settings."""

    @property
    def has_depth(self) -> bool:
        """Whether `make` heeds the depth."""
        ...

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float, choose: random.Random
    ) -> Example | Row:
        """An example, a function of the arguments and of the state of `choose`.

        Args:
          length: tokens of prompt and answer, at most; as many as fit are used.
          depth: where in the context the answer stands: 0 is its beginning, 1 its end.

        Raises:
          UserError: the length is too short.
        """
        ...


class Asked(NamedTuple):
    """A question's text, its answers and their depth; see `Question`."""

    text: str
    answers: tuple[str, ...]
    depth: float | None

    @property
    def answer(self) -> str:
        """What should follow the text."""
        return " " + ", ".join(self.answers)

    @property
    def solved(self) -> str:
        """The text with the answer, for what comes before the one that is asked."""
        return f"{self.text}{self.answer}."


def compose(
    tokenizer: Tokenizer,
    length: int,
    context: Callable[[int], str],
    asked: Sequence[Asked],
    least: int = 0,
) -> Example:
    """The example with the longest context that leaves room for every question and its answer.

    Args:
      context: the text with so many units, such as words of filler; one unit more is a few tokens
        more, at least one.
      least: units.

    Raises:
      UserError: the length has no room for `least` units.
    """
    questions = tuple(_question(tokenizer, one) for one in asked)
    needed = 1 + max(len(question.tokens) + question.wanted for question in questions)
    room = length - needed
    units, tokens = least, tokenizer.encode(context(least))
    if len(tokens) > room:
        raise UserError(
            f"{length} tokens are too few: the shortest prompt and its answer take "
            f"{needed + len(tokens)}; give longer --lengths"
        )
    too_many, rate = least + length + 1, 1.0
    while True:
        # what the last step tells of a unit's tokens says where the end may be
        more = max(int((room - len(tokens)) / rate), 1)
        guess = min(units + more, too_many - 1)
        if guess <= units:
            break
        found = tokenizer.encode(context(guess))
        rate = max((len(found) - len(tokens)) / (guess - units), 1.0)
        if len(found) <= room:
            units, tokens = guess, found
        else:
            too_many = guess
    return Example(np.array([tokenizer.begin_of_text, *tokens], np.int32), questions)


def fingerprint(examples: Iterable[Example | Row]) -> str:
    """SHA-256 of the examples' token ids, each text after its length, as little-endian int32."""
    digest = hashlib.sha256()
    for example in examples:
        parts = [example.tokens] if isinstance(example, Row) else [example.context]
        if isinstance(example, Example):
            parts += [question.tokens for question in example.questions]
        for part in parts:
            digest.update(np.array([len(part), *part], "<i4").tobytes())
    return digest.hexdigest()


def _question(tokenizer: Tokenizer, asked: Asked) -> Question:
    answer = tokenizer.encode(asked.answer)
    wanted = len(answer) + _SPARE * len(asked.answers)
    tokens = np.array(tokenizer.encode(asked.text), np.int32)
    return Question(tokens, asked.answers, wanted, asked.depth)
