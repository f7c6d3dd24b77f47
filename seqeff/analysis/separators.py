"""The separators of a tokenizer, and how dense they are in a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from seqeff.checks import ConfigError, UserError
from seqeff.data import Tokenizer
from seqeff.models import separator_tokens

_LISTED = 12
# characters tokenized at a time
_PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class SeparatorCounts:
    """How often each token id occurs in a text."""

    occurrences: np.ndarray

    @property
    def tokens(self) -> int:
        """Of the text."""
        return int(self.occurrences.sum())

    def density(self, ids: Sequence[int]) -> float:
        """The fraction of the text's tokens that are among the ids."""
        return float(self.occurrences[list(ids)].sum() / max(self.tokens, 1))


def count_separators(tokenizer: Tokenizer, files: Sequence[Path]) -> SeparatorCounts:
    """Counts the tokens of text files.

    Raises:
      UserError: a file cannot be read, or holds no text.
    """
    occurrences = np.zeros(len(tokenizer.vocabulary()), np.int64)
    for file in files:
        for piece in _pieces(file):
            found = np.asarray(tokenizer.encode(piece), np.int64)
            occurrences += np.bincount(found, minlength=len(occurrences))
    if files and not occurrences.any():
        raise UserError(f"{', '.join(map(str, files))}: there is no text to count")
    return SeparatorCounts(occurrences)


def describe(path: Path, files: Sequence[Path]) -> str:
    """The separators by the tokens' text and by each preset that fits, and how dense they are.

    Args:
      path: of a tokenizer's file or directory.
      files: texts to measure the density in; none: the lists alone.

    Raises:
      UserError: the tokenizer or a text cannot be read.
    """
    tokenizer = Tokenizer.load(path)
    vocabulary = tokenizer.vocabulary()
    counts = count_separators(tokenizer, files)
    lists = {"by the tokens' last character": (separator_tokens.CHARACTERS, None)}
    lists |= {f"preset {name}": ("", name) for name in separator_tokens.PRESETS}
    lines = [f"{path}: {len(vocabulary)} tokens"]
    if files:
        what = str(files[0]) if len(files) == 1 else f"{len(files)} texts"
        lines.append(f"{what}: {counts.tokens:,} tokens")
    for name, (characters, preset) in lists.items():
        try:
            ids = separator_tokens.find("SeparatorAttention", vocabulary, characters, preset=preset)
        except ConfigError as error:
            # a preset may be the list of another tokenizer
            if preset is None:
                lines += ["", str(error)]
            continue
        lines += ["", f"{name}: {len(ids)} separators", *_listed(vocabulary, ids, counts, files)]
    return "\n".join(lines)


def _listed(
    vocabulary: Sequence[str], ids: Sequence[int], counts: SeparatorCounts, files: Sequence[Path]
) -> Iterator[str]:
    if not files:
        shown = ", ".join(repr(vocabulary[i]) for i in ids[:_LISTED])
        yield f"  {shown}{', ...' if len(ids) > _LISTED else ''}"
        return
    yield f"  {counts.density(ids):.2%} of the tokens; the most frequent:"
    frequent = sorted(ids, key=lambda i: -counts.occurrences[i])[:_LISTED]
    for token in frequent:
        if counts.occurrences[token]:
            yield f"  {counts.density([token]):8.2%}  {token:6}  {vocabulary[token]!r}"


def _pieces(file: Path) -> Iterator[str]:
    """A file's text in pieces that end with lines, so that hardly a token is cut."""
    try:
        # line ends are the text's own, as in training
        with open(file, encoding="utf-8-sig", newline="") as text:
            lines = text.readlines(_PIECE)
            while lines:
                yield "".join(lines)
                lines = text.readlines(_PIECE)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} as UTF-8 text: {error}") from error
