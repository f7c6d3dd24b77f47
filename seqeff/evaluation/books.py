"""Long texts, and what reading them costs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from seqeff.checks import UserError
from seqeff.data import Tokenizer
from seqeff.data.files import decode_utf8, read_bytes
from seqeff.evaluation.perplexity import Perplexity


class Book(NamedTuple):
    """A text: its name, and its tokens, the end of text before them."""

    name: str
    tokens: Int[np.ndarray, " tokens"]

    @property
    def sha256(self) -> str:
        """Of the token ids, as little-endian int32."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()

    def parts(self, count: int, first: int, last: int) -> Int[np.ndarray, " tokens"]:
        """In which of so many equal parts tokens [first, last) are; the text's last is in none."""
        predicted = len(self.tokens) - 1
        places = np.arange(first, min(last, predicted))
        return (places * count // max(predicted, 1)).astype(np.int32)


def read_books(tokenizer: Tokenizer, files: Sequence[Path]) -> list[Book]:
    """Of text files, all of which are read before the first is tokenized.

    Raises:
      UserError: one cannot be read, or is empty.
    """
    texts = []
    for file in files:
        # as `TextFiles` reads them: line ends are the text's own
        text = decode_utf8(read_bytes(file), str(file))
        if not text:
            raise UserError(f"{file} is empty; leave it out")
        texts.append(text)
    begin = tokenizer.begin_of_text
    return [
        Book(file.name, np.asarray([begin, *tokenizer.encode(text)], np.int32))
        for file, text in zip(files, texts, strict=True)
    ]


@dataclass(frozen=True)
class StreamResult:
    """What a text costs.

    Attributes:
      parts: of it, in order.
      seconds: on the clock, compilation not included.
      device_bytes: of the program that reads it: parameters, cache, a chunk's activations.
    """

    parts: tuple[Perplexity, ...]
    seconds: float
    device_bytes: int

    @classmethod
    def of(cls, sums: Sequence[Sequence[float]], seconds: float, device_bytes: int) -> StreamResult:
        """From the sums of each part; see `added`."""
        return cls(tuple(Perplexity.of(np.array([part])) for part in sums), seconds, device_bytes)

    @classmethod
    def total(cls, results: Sequence[StreamResult]) -> StreamResult:
        """Of several texts, in as many parts."""
        parts = zip(*(result.parts for result in results), strict=True)
        return cls(
            tuple(map(Perplexity.total, parts)),
            sum(result.seconds for result in results),
            max(result.device_bytes for result in results),
        )

    @property
    def perplexity(self) -> Perplexity:
        """Of the whole."""
        return Perplexity.total(self.parts)

    def as_metrics(self) -> dict[str, Any]:
        """For reports."""
        whole = self.perplexity
        by_part = [part.as_metrics() for part in self.parts]
        return {
            **whole.as_metrics(),
            "seconds": self.seconds,
            "tokens_per_second": whole.tokens / max(self.seconds, 1e-9),
            "device_bytes": self.device_bytes,
            **({"parts": by_part} if len(by_part) > 1 else {}),
        }


def added(sums: Sequence[Any]) -> Float[np.ndarray, "parts 5"]:
    """Sums of all but the last column, what is resident, whose largest is taken."""
    together = np.asarray(jax.device_get(sums), np.float64)
    return np.concatenate([together[..., :4].sum(0), together[..., 4:].max(0)], axis=1)


def first_call(program: Any, *arguments: Any) -> int:
    """Compiles and calls a jitted function; gives the bytes that it needs of the device."""
    memory = program.lower(*arguments).compile().memory_analysis()
    jax.block_until_ready(program(*arguments))
    if memory is None:  # the backend does not tell
        return 0
    given_back = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + given_back + memory.temp_size_in_bytes
