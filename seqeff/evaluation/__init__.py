"""Scores of a trained model."""

from seqeff.evaluation.perplexity import Perplexity, make_evaluate
from seqeff.evaluation.streaming import (
    Book,
    Stream,
    StreamResult,
    read_in_rows,
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
    "read_in_rows",
    "require_constant_memory",
    "require_positions",
    "stream",
]
