"""Requests, and what they give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from seqeff.checks import UserError, require
from seqeff.data import Vocabulary
from seqeff.inference.sampling import Sampling
from seqeff.inference.text import StoppedText

Reason = Literal["end", "length", "stop", "not finite"]


_LISTED = {"prompt": "a tokenizer's ids", "stops": "texts"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: ids; at least one.
      tokens: to draw at most.
      sampling: how each is drawn.
      stops: texts before the first of which the continuation ends.
    """

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling = Sampling()
    stops: Sequence[str] = ()

    def __post_init__(self) -> None:
        require(
            1 <= self.tokens < 2**31,
            f"Request.tokens = {self.tokens} must be at least 1, below 2**31",
        )
        for name in ("prompt", "stops"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"Request.{name} is a text: give a list, of {_LISTED[name]}")
        if not len(self.prompt):
            raise UserError("the prompt is empty: give at least one token")
        if "" in self.stops:
            raise UserError("a stop string is empty: give text that is to end the continuation")


class Piece(NamedTuple):
    """What a request gives at a time.

    Attributes:
      request: its number, from 0.
      text: further text; empty while it may be the beginning of a stop string.
      tokens: further ids, without an end of text.
      log_probabilities: theirs, under the model itself.
      reason: why it ends with this piece: an end of text, as many tokens as asked for or as there
        was room for, a stop string, or scores of the next token that are no numbers; None: it goes
        on.
    """

    request: int
    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    reason: Reason | None


def failures(ended: Mapping[Reason, int]) -> str | None:
    """What to say of requests that ended for want of numbers; None: there are none.

    Args:
      ended: how many requests did, by the reason.
    """
    if not (count := ended.get("not finite", 0)):
        return None
    return (
        f"{count:,} of {sum(ended.values()):,} continuations end early, as the model's output is "
        "not finite there: see to the run's losses, and try an earlier --checkpoint, or "
        "--gin.TransformerConfig.dtype=float32"
    )


def check_room(request: Request, context: int | None) -> None:
    """Raises a UserError if a context has no room for a request's prompt and one token."""
    length = len(request.prompt)
    if context is not None and length >= context:
        raise UserError(
            f"the prompt has {length} tokens; the context of {context} leaves room for "
            f"{context - 1} before the first new one; --context gives more, and bounded separators "
            "in every layer take any number (--gin.SeparatorAttention.separators)"
        )


def check_ids(request: Request, vocabulary_size: int) -> None:
    """Raises a UserError if a request's prompt has what is no id of the model."""
    ids = np.asarray(request.prompt)
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= vocabulary_size:
        raise UserError(
            "the prompt has what is no id of the model: give whole numbers from 0 to "
            f"{vocabulary_size - 1}"
        )


class Occupant:
    """The request in a slot.

    Attributes:
      read: tokens of its prompt that calls have taken.
      scheduled: tokens that calls draw, if it does not end before.
      reason: why it has ended, once the host knows.
    """

    def __init__(self, number: int, request: Request, wanted: int, tokenizer: Vocabulary) -> None:
        self.number, self.request, self.wanted = number, request, wanted
        self.read = self.scheduled = self._drawn = 0
        self.reason: Reason | None = None
        self._text, self._ends = StoppedText(tokenizer, request.stops), tokenizer.ends_of_text

    @property
    def reads(self) -> bool:
        """Whether there is more of its prompt to read."""
        return self.read < len(self.request.prompt)

    @property
    def decodes(self) -> bool:
        """Whether further tokens are to be drawn by further calls."""
        return not self.reads and self.scheduled < self.wanted and self.reason is None

    def take(self, drawn: Iterable[tuple[int, float]]) -> Piece | None:
        """What tokens and their log-probabilities give; None where it has ended, or there are none.

        What lies past its end is dropped.
        """
        if self.reason is not None:
            return None
        text, tokens, probabilities = "", [], []
        for token, log_probability in drawn:
            self._drawn += 1
            if not math.isfinite(log_probability):
                # of what is no number the likeliest is the first id, often the end of text
                self.reason = "not finite"
                break
            if token in self._ends:
                self.reason = "end"
                break
            tokens.append(token)
            probabilities.append(log_probability)
            text += self._text.push(token)
            if self._text.stopped:
                self.reason = "stop"
                break
        if self.reason is None and self._drawn == self.wanted:
            self.reason = "length"
        if self.reason is not None:
            text += self._text.finish()
        elif not tokens:
            return None
        return Piece(self.number, text, tuple(tokens), tuple(probabilities), self.reason)
