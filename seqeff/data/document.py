"""What a source yields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Document(NamedTuple):
    """A text; with a prompt before it, the loss counts on `text` only."""

    text: str
    prompt: str = ""


@runtime_checkable
class Source(Protocol):
    """Any config class with these two methods is a source of text.

    Fields that name local files have a type of `seqeff.paths`.
    """

    def documents(self) -> Iterator[Document]:
        """All documents, in an order that never changes; may be called more than once."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON that differs when the documents may differ, computed without reading them all."""
        ...
