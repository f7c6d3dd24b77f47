"""Which bytes a token adds to a text, read off the tokenizer's decoder."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from seqeff.checks import UserError

_SUPPORTED = ("ByteLevel", "Metaspace", "ByteFallback", "Replace", "Fuse", "Strip")


class ByteLengths(NamedTuple):
    """UTF-8 bytes that each id adds to a text; 0 for special tokens and unused ids.

    Attributes:
      inside: within a text.
      first: as its first token, of which some tokenizers mark the word with a space that the text
        has not.
      begin: the id that stands before a text.
    """

    inside: Int32[np.ndarray, " vocabulary"]
    first: Int32[np.ndarray, " vocabulary"]
    begin: int

    def of(self, tokens: Int[Array, "*shape"], before: Int[Array, "*shape"]) -> Array:
        """Bytes of tokens, int32 [*shape], by the ones before each."""
        inside, first = (jnp.take(jnp.asarray(x), tokens, mode="clip") for x in self[:2])
        return jnp.where(before == self.begin, first, inside)


def token_to_bytes(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """From a token as the vocabulary spells it to its UTF-8 bytes inside a text.

    Args:
      decoder: the entry `decoder` of a `tokenizer.json`.

    Raises:
      UserError: with this decoder a token has no bytes of its own (WordPiece, for example).
    """
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {step["type"] for step in steps}
    for kind in sorted(kinds.difference(_SUPPORTED)):
        raise UserError(
            f"the tokenizer's decoder {kind!r} is not supported; supported are "
            f"{', '.join(_SUPPORTED)}"
        )
    if "ByteLevel" in kinds:
        return _byte_level
    replacements = [
        _replacement(step) for step in steps if step["type"] in ("Metaspace", "Replace")
    ]

    def to_bytes(token: str) -> bytes:
        if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes.fromhex(token[3:5])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if "String" not in step["pattern"]:
        raise UserError("the tokenizer's decoder replaces a regular expression: not supported")
    return step["pattern"]["String"], step["content"]


def _byte_level(token: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return table
