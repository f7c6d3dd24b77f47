"""Batches of packed rows as a pure function of (seed, step)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from seqeff.checks import require
from seqeff.data.batch import Batch, BatchBuilder
from seqeff.data.packing import PACKINGS, Rows, consecutive
from seqeff.data.store import TokenStore

Packing = Literal["split", "whole"]
_MIXTURE_BLOCK = 2048
_DOCUMENTS, _ROWS, _MIXTURE = range(3)


class Batches:
    """An endless, shuffled stream of batches.

    One store: each epoch visits every row once, in an order of its own, in `steps_per_epoch`
    steps, the last of which is padded. Under `"split"` packing each epoch also concatenates the
    documents in an order of its own, so that other documents meet in a row; under `"whole"`
    packing they are packed once, in a random order, so that all epochs have equally many rows.

    Several stores: of every 2048 consecutive rows, each store has the share of its weight, rounded
    to whole rows, at least one; each runs through its own epochs.

    Only the latest epoch's order of each store is kept in memory; making it takes time and memory
    proportional to the documents.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        packing: Packing = "split",
        separate_documents: bool = True,
    ) -> None:
        """Defines the stream; nothing is read yet.

        Args:
          stores: where documents come from.
          sequence_length: positions of a row.
          batch_size: rows of a batch, over all processes.
          seed: of all shuffling, at least 0.
          weights: share of the rows of each store; equal by default.
          packing: `"split"` cuts documents at the ends of rows; `"whole"` cuts only those that are
            longer than a row.
          separate_documents: whether batches tell documents apart.

        Raises:
          ConfigError: a value out of its range, or not one weight a store.
        """
        _check(stores, sequence_length, batch_size, packing)
        require(len(stores) <= _MIXTURE_BLOCK, f"a mixture has at most {_MIXTURE_BLOCK} sources")
        require(
            weights is None or len(weights) == len(stores),
            f"weights = {weights} for {len(stores)} stores; give one weight a store",
        )
        self.batch_size = batch_size
        self._orders = [
            _Shuffled(store, number, seed, sequence_length, packing)
            for number, store in enumerate(stores)
        ]
        self._separate_documents = separate_documents
        self.sequence_length = sequence_length
        self._seed = seed
        self._shares = _shares(weights or [1.0] * len(stores))

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps that visit every row once; None for a mixture, whose stores differ."""
        if len(self._orders) > 1:
            return None
        return -(-self._orders[0].rows_per_epoch // self.batch_size)

    def __call__(self, step: int) -> Batch:
        """The whole batch of a step, counted from 0."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """The rows `[start, stop)` of a step's batch."""
        begin_of_text = self._orders[0].store.begin_of_text
        batch = BatchBuilder(
            stop - start, self.sequence_length, begin_of_text, self._separate_documents
        )
        source, index = self._locate(step, start, stop)
        for number, order in enumerate(self._orders):
            rows_per_epoch = order.rows_per_epoch
            for epoch in np.unique(index[source == number] // rows_per_epoch):
                here = (source == number) & (index // rows_per_epoch == epoch)
                rows, permutation = order.epoch(int(epoch))
                batch.fill(here, order.store, rows, permutation[index[here] % rows_per_epoch])
        return batch.batch()

    def _locate(
        self, step: int, start: int, stop: int
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Store of each row, -1 for padding, and how many of that store's rows came before it."""
        row = np.arange(start, stop)
        steps_per_epoch = self.steps_per_epoch
        if steps_per_epoch is not None:
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            row = row + step_of_epoch * self.batch_size
            rows_per_epoch = self._orders[0].rows_per_epoch
            padding = row >= rows_per_epoch
            return np.where(padding, -1, 0), row + epoch * rows_per_epoch
        slot = step * self.batch_size + row
        block = slot // _MIXTURE_BLOCK
        source, index = np.zeros_like(slot), np.zeros_like(slot)
        for number in np.unique(block):
            here = block == number
            sources, ranks = self._mixture_block(int(number))
            source[here] = sources[slot[here] % _MIXTURE_BLOCK]
            index[here] = ranks[slot[here] % _MIXTURE_BLOCK] + number * self._shares[source[here]]
        return source, index

    def _mixture_block(
        self, number: int
    ) -> tuple[Int64[np.ndarray, " block"], Int64[np.ndarray, " block"]]:
        """The store of each slot of a block, and how many of its slots in the block came before."""
        sources = np.repeat(np.arange(len(self._shares)), self._shares)
        sources = sources[permutation_of(_MIXTURE_BLOCK, self._seed, _MIXTURE, number)]
        ranks = np.empty_like(sources)
        ranks[np.argsort(sources, kind="stable")] = consecutive(
            np.zeros_like(self._shares), self._shares
        )
        return sources, ranks


class EvaluationBatches:
    """One pass over stores in their own order; the last batch is padded. `len()` is its steps.

    Attributes:
      sha256: of the documents: the store's own, or where there are several, of theirs.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        sequence_length: int,
        batch_size: int,
        packing: Packing = "split",
        separate_documents: bool = True,
    ) -> None:
        """As for `Batches`; documents of different stores never share a row."""
        _check(stores, sequence_length, batch_size, packing)
        self.batch_size = batch_size
        contents = [store.part.content for store in stores]
        whole = hashlib.sha256("".join(contents).encode()).hexdigest()
        self.sha256 = contents[0] if len(contents) == 1 else whole
        self._stores = stores
        self._rows = [
            PACKINGS[packing](store, np.arange(len(store.lengths)), sequence_length)
            for store in stores
        ]
        self._first = np.append(0, np.cumsum([rows.count for rows in self._rows]))
        self.sequence_length = sequence_length
        self._separate_documents = separate_documents

    def __len__(self) -> int:
        """Steps of the pass."""
        return -(-int(self._first[-1]) // self.batch_size)

    def __call__(self, step: int) -> Batch:
        """The whole batch of a step, counted from 0."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """The rows `[start, stop)` of a step's batch; beyond the last step all is padding."""
        begin_of_text = self._stores[0].begin_of_text
        batch = BatchBuilder(
            stop - start, self.sequence_length, begin_of_text, self._separate_documents
        )
        row = step * self.batch_size + np.arange(start, stop)
        for store, rows, first in zip(self._stores, self._rows, self._first[:-1], strict=True):
            here = (row >= first) & (row < first + rows.count)
            if here.any():
                batch.fill(here, store, rows, row[here] - first)
        return batch.batch()


def permutation_of(
    count: int, seed: int, purpose: int, number: int, store: int = 0
) -> Int64[np.ndarray, " count"]:
    """A random permutation that depends on its arguments alone.

    It sorts raw Philox words, whose values numpy guarantees, unlike those of `Generator` methods.
    """
    bits = np.random.Philox(
        key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, number, store], np.uint64)
    )
    return np.argsort(bits.random_raw(count), kind="stable")


class _Shuffled:
    """The order in which a store's rows are visited."""

    def __init__(
        self, store: TokenStore, number: int, seed: int, sequence_length: int, packing: Packing
    ) -> None:
        self.store = store
        self._number = number
        self._seed = seed
        self._length = sequence_length
        self._packing: Packing = packing
        self._latest_pack: tuple[int, Rows] | None = None
        self._latest_order: tuple[int, Int64[np.ndarray, " rows"]] | None = None

    @functools.cached_property
    def rows_per_epoch(self) -> int:
        if self._packing == "split":
            return -(-self.store.part.tokens // self._length)
        return self._pack(0).count

    def epoch(self, epoch: int) -> tuple[Rows, Int64[np.ndarray, " rows"]]:
        """The packed rows, and the order in which the epoch visits them."""
        # another thread may ask for another epoch meanwhile
        latest = self._latest_order
        if latest is None or latest[0] != epoch:
            order = permutation_of(self.rows_per_epoch, self._seed, _ROWS, epoch, self._number)
            latest = self._latest_order = epoch, order
        return self._pack(epoch if self._packing == "split" else 0), latest[1]

    def _pack(self, epoch: int) -> Rows:
        latest = self._latest_pack
        if latest is None or latest[0] != epoch:
            documents = len(self.store.lengths)
            order = permutation_of(documents, self._seed, _DOCUMENTS, epoch, self._number)
            latest = self._latest_pack = (
                epoch,
                PACKINGS[self._packing](self.store, order, self._length),
            )
        return latest[1]


def _shares(weights: Sequence[float]) -> Int64[np.ndarray, " stores"]:
    """Rows of each store in a block: at least one each, the others by largest remainder."""
    exact = np.array(weights, np.float64) / sum(weights) * _MIXTURE_BLOCK
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := _MIXTURE_BLOCK - shares.sum()) != 0:
        change = int(np.sign(missing))
        candidates = np.where((shares > 1) | (change > 0), (exact - shares) * change, -np.inf)
        shares[np.argmax(candidates)] += change
    return shares


def _check(
    stores: Sequence[TokenStore], sequence_length: int, batch_size: int, packing: str
) -> None:
    require(len(stores) > 0, "batches need at least one store of documents")
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        require(value >= 1, f"{name} = {value} must be at least 1")
    require(packing in PACKINGS, f"packing = {packing!r} must be one of {', '.join(PACKINGS)}")
