"""Where a run's tokenizer comes from: a file, or training on the corpus."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers

from seqeff.checks import UserError, check_types, require
from seqeff.data.cache import build_once, cache_key, writing_to
from seqeff.data.tokenizer import LONGEST_PIECE, Tokenizer, pieces_of
from seqeff.paths import LocalPath


@runtime_checkable
class TokenizerConfig(Protocol):
    """Any config class with this method provides a tokenizer."""

    def build(
        self, texts: Callable[[], Iterable[str]], corpus: Mapping[str, Any], cache: Path
    ) -> Tokenizer:
        """The tokenizer for a corpus.

        Args:
          texts: yields the training texts, again at each call.
          corpus: JSON that identifies those texts.
          cache: the folder where what is costly to make is kept.
        """
        ...

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises a `UserError` if a run's own tokenizer cannot have come from this config."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Attributes:
      path: the file, or the folder that holds it.
      end_of_text: the token that separates documents; null takes it from a `tokenizer_config.json`
        beside the file or from the usual names.
    """

    path: LocalPath
    end_of_text: str | None = None

    def __post_init__(self) -> None:
        check_types(self)

    def build(
        self, texts: Callable[[], Iterable[str]], corpus: Mapping[str, Any], cache: Path
    ) -> Tokenizer:
        return Tokenizer.load(self.path, self.end_of_text)

    def check(self, tokenizer: Tokenizer) -> None:
        """Compares with the file, if it is still there."""
        if not Path(self.path).expanduser().exists():
            return
        if Tokenizer.load(self.path, self.end_of_text).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"TokenizerFile.path = {self.path!r} is not the tokenizer of the run; restore that "
                "file, or start a new run"
            )


@dataclass(frozen=True, kw_only=True)
class TrainBPE:
    """A byte-level BPE tokenizer trained on the corpus, the same at every start.

    Attributes:
      vocabulary_size: entries at most, 256 bytes and the end of text included; a small corpus
        yields fewer.
      end_of_text: the token that separates documents.
      training_characters: how much of the corpus, from its start, is read for training.
    """

    vocabulary_size: int
    end_of_text: str = "<|endoftext|>"
    training_characters: int = 1 << 29

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.vocabulary_size >= 257,
            f"TrainBPE.vocabulary_size = {self.vocabulary_size}: 256 bytes and the end of text "
            "need at least 257",
        )
        require(self.end_of_text != "", "TrainBPE.end_of_text is empty; name a token")
        require(
            self.training_characters > 0,
            f"TrainBPE.training_characters = {self.training_characters} must be positive",
        )

    def build(
        self, texts: Callable[[], Iterable[str]], corpus: Mapping[str, Any], cache: Path
    ) -> Tokenizer:
        """Trains, or loads what an earlier call with the same corpus and settings trained."""
        key = cache_key({"format": 1, "corpus": corpus, "settings": asdict(self)})
        directory = cache / "tokenizers" / key

        def train(partial: Path) -> None:
            tokenizer = self._train(texts())
            with writing_to(partial):
                tokenizer.save(partial)

        build_once(directory, train)
        return Tokenizer.load(directory)

    def check(self, tokenizer: Tokenizer) -> None:
        """Compares size and end of text; the corpus is compared by its own hash."""
        name = tokenizer.end_of_text_name
        if tokenizer.vocabulary_size > self.vocabulary_size or name != self.end_of_text:
            raise UserError(
                f"TrainBPE(vocabulary_size={self.vocabulary_size}, end_of_text="
                f"{self.end_of_text!r}) cannot have made the tokenizer of the run, which has "
                f"{tokenizer.vocabulary_size} entries and {name!r}; restore the setting, or start "
                "a new run"
            )

    def _train(self, texts: Iterable[str]) -> Tokenizer:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocabulary_size,
            special_tokens=[self.end_of_text],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=sys.stderr.isatty(),
        )
        inner.train_from_iterator(_beginning(texts, self.training_characters), trainer)
        return Tokenizer(inner, self.end_of_text)


def _beginning(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        text = text[:characters]
        characters -= len(text)
        yield from pieces_of(text, LONGEST_PIECE)
        if not characters:
            return
