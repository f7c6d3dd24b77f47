"""One batch, and the gathering of its rows from a store."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt

from seqeff.data.packing import Rows, consecutive
from seqeff.data.store import TokenStore


class Batch(NamedTuple):
    """What a training step reads: numpy arrays on the host, jax arrays on the devices.

    Attributes:
      tokens: input ids.
      targets: the id that follows each input in its document, or the end of text.
      loss_weights: 0 where a target carries no loss (prompts, padding), else 1.
      document_start: index in the row of the first token of each position's document; a document
        that continues from another row, and the padding, begin one of their own. None where
        documents are not separated.
    """

    tokens: Int32[Any, "batch length"]
    targets: Int32[Any, "batch length"]
    loss_weights: Float32[Any, "batch length"]
    document_start: Int32[Any, "batch length"] | None


class BatchBuilder:
    """A batch that is padding until its rows are filled. Padding has weight 0."""

    def __init__(self, rows: int, length: int, padding: int, separate_documents: bool) -> None:
        """Starts with `rows` rows of `length` positions, filled with the id `padding`."""
        shape = rows, length
        self._tokens = np.full(shape, padding, np.int32)
        self._targets = np.full(shape, padding, np.int32)
        self._weights = np.zeros(shape, np.float32)
        self._document_start = np.zeros(shape, np.int32) if separate_documents else None

    def fill(
        self,
        here: Bool[np.ndarray, " batch"],
        store: TokenStore,
        rows: Rows,
        chosen: Int64[np.ndarray, " rows"],
    ) -> None:
        """Fills rows of the batch.

        Args:
          here: which rows of the batch.
          store: where the entries are.
          rows: all packed rows of the store.
          chosen: the packed row for each row in `here`.
        """
        first = rows.first[chosen]
        counts = rows.first[chosen + 1] - first
        pieces = consecutive(first, counts)
        lengths = rows.lengths[pieces]
        ends = np.cumsum(lengths)
        last_pieces = np.cumsum(counts) - 1
        row_ends = ends[last_pieces]
        row_begins = np.append(0, row_ends[:-1])
        row_lengths = row_ends - row_begins

        tokens, following = _read(store, rows.starts[pieces], lengths)
        targets = np.empty_like(tokens)
        targets[:-1] = tokens[1:]
        targets[ends - 1] = following
        weights = np.ones(len(tokens), np.float32)
        if rows.unscored is not None:
            weights[consecutive(ends - lengths, rows.unscored[pieces])] = 0

        _assign(self._tokens, here, row_lengths, tokens)
        _assign(self._targets, here, row_lengths, targets)
        _assign(self._weights, here, row_lengths, weights)
        if self._document_start is not None:
            self._document_start[here] = row_lengths[:, None]
            starts = (ends - lengths - np.repeat(row_begins, counts)).astype(np.int32)
            _assign(self._document_start, here, row_lengths, np.repeat(starts, lengths))

    def batch(self) -> Batch:
        """The batch; the builder is spent."""
        return Batch(self._tokens, self._targets, self._weights, self._document_start)


def _assign(
    array: np.ndarray,
    here: Bool[np.ndarray, " batch"],
    row_lengths: Int64[np.ndarray, " rows"],
    values: np.ndarray,
) -> None:
    """Writes rows that follow each other in `values` to the beginnings of rows of an array."""
    length = array.shape[1]
    if (row_lengths == length).all():
        array[here] = values.reshape(-1, length)
        return
    filled = np.zeros(array.shape, bool)
    filled[here] = np.arange(length) < row_lengths[:, None]
    array[filled] = values


def _read(
    store: TokenStore, starts: Int64[np.ndarray, " pieces"], lengths: Int64[np.ndarray, " pieces"]
) -> tuple[UInt[np.ndarray, " entries"], UInt[np.ndarray, " pieces"]]:
    """The entries of pieces one after the other, and the entry that follows each piece."""
    shard_of = np.searchsorted(store.shard_starts, starts, side="right") - 1
    touched = np.unique(shard_of)
    if len(touched) == 1:
        shard, begins = store.shards[touched[0]], starts - store.shard_starts[touched[0]]
        return shard.take(consecutive(begins, lengths)), shard.take(begins + lengths)
    dtype = store.shards[0].dtype
    tokens, following = np.empty(lengths.sum(), dtype), np.empty(len(lengths), dtype)
    places = np.cumsum(lengths) - lengths
    for number in touched:
        here = shard_of == number
        shard, begins = store.shards[number], starts[here] - store.shard_starts[number]
        tokens[consecutive(places[here], lengths[here])] = shard.take(
            consecutive(begins, lengths[here])
        )
        following[here] = shard.take(begins + lengths[here])
    return tokens, following
