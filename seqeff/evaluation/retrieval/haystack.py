"""Text of no importance, and sentences hidden in it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from seqeff.checks import UserError, check_types
from seqeff.data.files import decode_utf8, read_bytes
from seqeff.paths import LocalPath

SENTENCES = (
    "The path along the river was dry again after three days of wind.",
    "Nobody in the village could say when the old mill had stopped turning.",
    "A cart with two wheels stood behind the bakery, full of empty sacks.",
    "In the afternoon the light came in low and fell on the kitchen table.",
    "She folded the letter, put it into the drawer, and went out to the hens.",
    "Most of the apples had fallen early, and the children gathered them in baskets.",
    "There was a smell of tar near the boats, as there always was in spring.",
    "The teacher opened the window and waited until the bell had rung.",
    "Far off, on the other side of the valley, a dog barked twice and was quiet.",
    "They repaired the roof before the rain, one row of tiles after another.",
    "The train was late, so the men on the platform talked about the harvest.",
    "Her grandfather had planted the walnut tree in the year of the flood.",
    "It took them an hour to find the key, which hung where it always hung.",
    "On market days the square was so full that the fountain could not be seen.",
    "The clock in the hall was slow, but everyone was used to it.",
    "He whistled while he swept the yard and stopped when the gate opened.",
    "Snow lay on the upper fields, although the lower ones were green.",
    "The shop sold rope, candles, nails, and a kind of hard cheese.",
    "Every evening the ferry went across once more, whether or not anyone came.",
    "A grey cat slept on the wall and did not mind the noise of the street.",
    "The doctor came on foot, because the bridge was closed for the week.",
    "Between the two houses there was just enough room for a ladder.",
    "The soup was thin that winter, yet nobody complained about it.",
    "When the fog lifted, the hills looked closer than they were.",
)
# words by which a hidden sentence may be moved to stand between two others
_NEAR = 32
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclasses.dataclass(frozen=True)
class Filler:
    """Where text of no importance comes from.

    Attributes:
      path: a text file, whose words come again and again; null: `SENTENCES`.
    """

    path: LocalPath | None = None

    def __post_init__(self) -> None:
        check_types(self)

    def words(self, choose: random.Random, count: int) -> list[str]:
        """So many: the sentences in another order each time, or the file's from a place on.

        Raises:
          UserError: the file cannot be read, or has no words.
        """
        if self.path is not None:
            text = _words(self.path)
            following = itertools.islice(itertools.cycle(text), choose.randrange(len(text)), None)
            return list(itertools.islice(following, count))
        found: list[str] = []
        while len(found) < count:
            for sentence in choose.sample(SENTENCES, len(SENTENCES)):
                found += sentence.split()
        return found[:count]


def hide(words: Sequence[str], sentences: Iterable[tuple[float, str]]) -> str:
    """Words as a text that ends with a full stop, with each sentence at its depth.

    A sentence stands between two others, where one ends near.

    Args:
      sentences: and their depths, which do not decrease.
    """
    words, parts, begin = [*words], [], 0
    if words and not _ends(words[-1]):
        words[-1] = words[-1].rstrip(",;:") + "."
    for depth, sentence in sentences:
        place = _place(words, depth)
        parts += [*words[begin:place], sentence]
        begin = place
    return " ".join((*parts, *words[begin:]))


def words_of(text: str) -> list[str]:
    """Runs of letters and digits."""
    return re.findall(r"\w+", text)


def new(draw: Callable[[], str], taken: set[str]) -> str:
    """What is drawn first that is not taken, which it is from then on.

    Raises:
      UserError: everything drawn is taken.
    """
    for _ in range(10_000):
        word = draw()
        if word not in taken:
            taken.add(word)
            return word
    raise UserError("the filler holds every answer that there could be; give another --filler")


def number(choose: random.Random, digits: int) -> str:
    """Of so many digits, the first of which is not 0."""
    return str(choose.randrange(10 ** (digits - 1), 10**digits))


def invented_word(choose: random.Random) -> str:
    """Three syllables that mean nothing."""
    return "".join(choose.choice(_CONSONANTS) + choose.choice(_VOWELS) for _ in range(3))


@functools.cache
def _words(path: str) -> tuple[str, ...]:
    words = tuple(decode_utf8(read_bytes(Path(path)), path).split())
    if not words:
        raise UserError(f"{path} has no words; name another text")
    return words


def _place(words: Sequence[str], depth: float) -> int:
    """How many words stand before a sentence at this depth."""
    wanted = round(depth * len(words))
    for distance in range(_NEAR):
        for place in (wanted - distance, wanted + distance):
            if place in (0, len(words)) or (0 < place < len(words) and _ends(words[place - 1])):
                return place
    return wanted


def _ends(word: str) -> bool:
    return word.rstrip("\"')]\u201d\u2019").endswith((".", "!", "?"))
