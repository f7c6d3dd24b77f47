"""Rows of equal length, made of whole documents or of their pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from seqeff.data.store import TokenStore


class Rows(NamedTuple):
    """Where the entries of every row come from. A piece is a run of entries of one document.

    Attributes:
      starts: of each piece in the store, in the order of the rows.
      lengths: entries of each piece.
      unscored: targets at the beginning of each piece that carry no loss; None where all do.
      first: first piece of each row, and the number of pieces.
    """

    starts: Int64[np.ndarray, " pieces"]
    lengths: Int64[np.ndarray, " pieces"]
    unscored: Int64[np.ndarray, " pieces"] | None
    first: Int64[np.ndarray, " rows+1"]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.first) - 1


def split_rows(
    store: TokenStore, order: Int64[np.ndarray, " documents"], sequence_length: int
) -> Rows:
    """Concatenates the documents and cuts at every multiple of the sequence length."""
    lengths = store.lengths[order].astype(np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    cuts = np.arange(0, ends[-1], sequence_length)
    # two ascending runs: a stable sort merges them in linear time
    bounds = np.sort(np.concatenate([begins, cuts]), kind="stable")
    bounds = bounds[np.diff(bounds, prepend=-1) > 0]
    document = np.searchsorted(begins, bounds, side="right") - 1
    return _rows(
        store,
        order[document],
        offsets=bounds - begins[document],
        lengths=np.diff(bounds, append=ends[-1]),
        first=np.append(np.searchsorted(bounds, cuts), len(bounds)),
    )


def whole_rows(
    store: TokenStore, order: Int64[np.ndarray, " documents"], sequence_length: int
) -> Rows:
    """Next-fit: a document that the row has no room for opens the next row.

    Documents longer than a row are first cut in pieces of a row's length and a rest.
    """
    lengths = store.lengths[order].astype(np.int64)
    counts = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(order)), counts)
    offsets = consecutive(np.zeros_like(counts), counts) * sequence_length
    pieces = np.minimum(lengths[document] - offsets, sequence_length)
    ends = np.append(0, np.cumsum(pieces))
    following = np.searchsorted(ends, ends[:-1] + sequence_length, side="right") - 1
    first = _chain(np.append(following, len(pieces)))
    return _rows(store, order[document], offsets, pieces, first)


PACKINGS: dict[str, Callable[[TokenStore, np.ndarray, int], Rows]] = {
    "split": split_rows,
    "whole": whole_rows,
}


def consecutive(
    begins: Int64[np.ndarray, " ranges"], counts: Int64[np.ndarray, " ranges"]
) -> Int64[np.ndarray, " total"]:
    """The integers `begin, begin + 1, ...` of each range, one range after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(begins - ends + counts, counts) + np.arange(total)


def _chain(following: Int64[np.ndarray, " nodes"]) -> Int64[np.ndarray, " visited"]:
    """0, following[0], following[following[0]], ... up to the last node.

    Pointer doubling: `jump` leads 2^k steps on, and each round doubles what is visited.
    """
    last = len(following) - 1
    visited, jump = np.zeros(1, np.int64), following
    while visited[-1] != last:
        visited = np.concatenate([visited, jump[visited]])
        jump = jump[jump]
    return visited[: int(np.searchsorted(visited, last)) + 1]


def _rows(
    store: TokenStore,
    document: Int64[np.ndarray, " pieces"],
    offsets: Int64[np.ndarray, " pieces"],
    lengths: Int64[np.ndarray, " pieces"],
    first: Int64[np.ndarray, " rows+1"],
) -> Rows:
    unscored = None
    if store.prompt_lengths is not None:
        unscored = np.clip(store.prompt_lengths[document] - offsets, 0, lengths)
    return Rows(store.starts[document] + offsets, lengths, unscored, first)
