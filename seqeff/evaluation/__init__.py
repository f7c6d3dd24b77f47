"""Scores of a trained model."""

from seqeff.evaluation.books import Book, StreamResult, read_books
from seqeff.evaluation.perplexity import Perplexity, make_evaluate
from seqeff.evaluation.rows import read_in_rows
from seqeff.evaluation.streaming import (
    Stream,
    require_constant_memory,
    require_positions,
    stream,
)

__all__ = [
    "Book",
    "Perplexity",
    "Stream",
    "StreamResult",
    "make_evaluate",
    "read_books",
    "read_in_rows",
    "require_constant_memory",
    "require_positions",
    "stream",
]
