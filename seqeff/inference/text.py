"""Text of tokens as they are drawn, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from seqeff.data import TokenStream, Vocabulary


class StoppedText:
    """The text of one request's tokens, which ends before the stop string that is whole first.

    Text that may turn out to be the beginning of a stop string is held back.

    Attributes:
      stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Vocabulary, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._stream = TokenStream(tokenizer)
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain with this token; nothing once it has stopped."""
        return self._release(self._stream.push(token))

    def finish(self) -> str:
        """What was held back, where no further token comes."""
        if self.stopped:
            return ""
        text = self._release(self._stream.finish())
        return text if self.stopped else text + self._held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(place + len(s), place) for s in self._stops if (place := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            _, place = min(found)
            return text[:place]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that is a beginning of a stop string, which it does not hold."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
