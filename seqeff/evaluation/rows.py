"""Perplexity of long texts in rows of the length of training."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seqeff.data import ByteLengths
from seqeff.evaluation.books import Book, StreamResult, added, first_call
from seqeff.evaluation.perplexity import sums_by_part
from seqeff.models import DenseAttention, TransformerConfig, token_losses
from seqeff.models.flops import abstract_model

# read at a time
_ROWS = 8


def read_in_rows(
    config: TransformerConfig,
    parameters: Any,
    byte_lengths: ByteLengths,
    books: Sequence[Book],
    length: int,
    parts: int = 1,
) -> Iterator[tuple[Book, StreamResult]]:
    """What `stream` yields, of a model that attends everything, in rows of `length` tokens.

    The last token of a row is the first of the next, so that every token but a text's first is
    predicted once. It is what a model can do within the length that it was trained on.
    """
    dense = dataclasses.replace(config, attention=DenseAttention(), layer_attention={})
    graph, _ = nnx.split(abstract_model(dense))

    @jax.jit
    def sums(
        parameters: Any, tokens: Array, targets: Array, part: Array
    ) -> Float[Array, "parts 5"]:
        model = nnx.merge(graph, parameters)
        losses = token_losses(model(tokens), model.head(), targets)
        sizes = byte_lengths.of(targets, tokens)
        place = jnp.broadcast_to(jnp.arange(1, length + 1), part.shape)
        return sums_by_part(part, parts, losses, sizes, place, place)

    empty = np.zeros((_ROWS, length), np.int32)
    device_bytes = first_call(sums, parameters, empty, empty, empty - 1)
    for book in books:
        begin = time.perf_counter()
        predicted, step = len(book.tokens) - 1, _ROWS * length
        missing = max(-(-predicted // step), 1) * step - predicted
        part = book.parts(parts, 0, predicted)
        texts = (
            np.pad(x, (0, missing), constant_values=fill).reshape(-1, _ROWS, length)
            for x, fill in ((book.tokens[:-1], 0), (book.tokens[1:], 0), (part, -1))
        )
        found = added([sums(parameters, *rows) for rows in zip(*texts, strict=True)])
        yield book, StreamResult.of(found.tolist(), time.perf_counter() - begin, device_bytes)
