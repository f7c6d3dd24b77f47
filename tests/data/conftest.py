from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from seqeff.data.build import PartWriter
from seqeff.data.document import Document
from seqeff.data.store import MANIFEST, Manifest, TokenStore
from seqeff.data.tokenizer import Tokenizer
from seqeff.data.tokenizer_config import TrainBPE

TEXT = (
    "The cat sat on the mat; the dog, who was old, did not.\n\n"
    "Ærøskøbing → «naïve» 漢字 🙂.\r\n\tdef f(x):\n        return x  # 12345\n"
)


@dataclass
class CountingSource:
    """Documents given by hand; counts how often they are read."""

    texts: list[str]
    name: str = "counting"
    prompts: list[str] | None = None
    reads: int = 0
    hooks: dict[int, Callable[[], None]] = field(default_factory=dict)

    def documents(self) -> Iterator[Document]:
        self.reads += 1
        prompts = self.prompts or [""] * len(self.texts)
        for index, (text, prompt) in enumerate(zip(self.texts, prompts, strict=True)):
            self.hooks.get(index, lambda: None)()
            yield Document(text, prompt)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "CountingSource", "name": self.name}


@pytest.fixture(scope="session")
def counting_source() -> type[CountingSource]:
    return CountingSource


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return TrainBPE(vocabulary_size=300)._train([TEXT * 20])


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenStore]:
    """Writes a store whose ids are all different, so that every entry tells where it is from."""
    numbers = itertools.count()

    def make(
        lengths: list[int],
        prompts: list[int] | None = None,
        *,
        first: int = 1,
        shard_tokens: int = 1 << 20,
    ) -> TokenStore:
        directory = tmp_path_factory.getbasetemp() / f"store-{next(numbers)}"
        directory.mkdir()
        writer = PartWriter(directory / "train", "uint32", 0, shard_tokens)
        for length, prompt in zip(lengths, prompts or [0] * len(lengths), strict=True):
            entries = np.append(0, np.arange(first, first + length))
            writer.append(entries, np.array([length + 1]), np.array([prompt]))
            first += length
        manifest = Manifest(
            tokenizer="tokenizer",
            begin_of_text=0,
            dtype="uint32",
            source={},
            holdout=0.0,
            parts={"train": writer.finish("content", 0)},
        )
        (directory / MANIFEST).write_text(manifest.to_json())
        return TokenStore(directory, "train")

    return make
