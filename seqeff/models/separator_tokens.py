"""Which tokens of a vocabulary are separators."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from seqeff.checks import require

CHARACTERS = ".,?!;: \t\n"

# The literal lists of the paper's code: training and streaming (the latter adds merged tokens).
PRESETS: dict[str, tuple[int, ...]] = {
    "pythia": (15, 13, 32, 2, 28, 27, 209, 186, 187),
    "pythia-streaming": (
        *(15, 13, 32, 2, 28, 27, 209, 186, 187),
        *(964, 1157, 3736, 2195, 3706, 1163, 2490, 50276, 586, 4928, 50275),
    ),
    "llama3": (13, 11, 30, 0, 26, 25, 198, 220, 128000),
    "llama3-streaming": (
        *(13, 11, 30, 0, 26, 25, 198, 220),
        *(662, 1174, 949, 758, 2652, 551, 720, 256, 262),
    ),
    "llama3-sepcache": (
        *(13, 11, 30, 0, 26, 25, 198, 220),
        *(662, 1174, 949, 758, 2652, 551, 720, 256, 262, 128000),
    ),
    "falcon": (25, 23, 42, 12, 38, 37, 193, 4610, 204, 258, 1212, 23787, 466),
}


def find(
    owner: str,
    vocabulary: Sequence[str],
    characters: str,
    preset: str | None = None,
    given: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """The ids of the separators: those of the preset, those given, or the tokens that end so.

    Args:
      owner: the config whose fields these are, for messages.
      vocabulary: decoded text of every token id.
      characters: a separator's text ends with one of them; "" for no separators.

    Raises:
      ConfigError: an id lies outside the vocabulary, no token ends with any character, or the
        preset's ids are mostly words here.
    """
    ids = given if preset is None else PRESETS[preset]
    if ids is None:
        endings = tuple(characters)
        ids = tuple(i for i, text in enumerate(vocabulary) if text.endswith(endings))
        require(
            bool(ids) or not characters,
            f"{owner}.characters = {characters!r}: no token of the tokenizer ends with any of them",
        )
    outside = [i for i in ids if not 0 <= i < len(vocabulary)]
    require(
        not outside,
        f"{owner}: separator ids {outside} lie outside the tokenizer's {len(vocabulary)} tokens",
    )
    if preset is not None:
        # not all: some lists hold the token that begins a text
        fitting = sum(vocabulary[i].endswith(tuple(CHARACTERS)) for i in ids)
        require(
            2 * fitting > len(ids),
            f"{owner}.preset = {preset!r} is for another tokenizer: {fitting} of its {len(ids)} "
            "ids end with punctuation or white space in this one; leave preset null to find "
            "separators by their text",
        )
    return ids


def check(owner: str, preset: str | None = None, given: tuple[int, ...] | None = None) -> None:
    """Refuses a preset that there is not, and ids that can be none."""
    require(
        preset is None or preset in PRESETS,
        f"{owner}.preset = {preset!r} is not one of {', '.join(PRESETS)}",
    )
    require(
        preset is None or given is None,
        f"{owner}.preset = {preset!r} and {owner}.separator_ids are both given; keep one",
    )
    require(
        min(given or (0,)) >= 0,
        f"{owner}.separator_ids = {given} must not be negative; give () for none",
    )


def are_separators(
    ids: tuple[int, ...], tokens: Int[Array, "batch length"]
) -> Bool[Array, "batch length"]:
    """Whether each token is one of the ids."""
    table = np.zeros(max(ids, default=0) + 1, bool)
    table[list(ids)] = True
    return jnp.take(table, tokens, mode="fill", fill_value=False)
