"""Batches on the devices before the step asks for them."""

from __future__ import annotations

import queue
import threading
from typing import Protocol

import jax

from seqeff.checks import ConfigError
from seqeff.data.batch import Batch

_STOP_POLL_SECONDS = 0.1


class RowSource(Protocol):
    """`Batches` and `EvaluationBatches`."""

    batch_size: int
    sequence_length: int

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """The rows `[start, stop)` of a step's batch."""
        ...


class Loader:
    """Iterates over batches that a thread reads and moves to the devices ahead of time.

    A context manager; leaving it, or `close()`, ends the thread. An error in the thread is raised
    by the next `next()`.
    """

    def __init__(
        self,
        batches: RowSource,
        first_step: int = 0,
        last_step: int | None = None,
        *,
        sharding: jax.sharding.Sharding | None = None,
        prefetch: int = 2,
    ) -> None:
        """Starts to read.

        Args:
          batches: what to read; each process reads only the rows that its devices hold.
          first_step: the first batch.
          last_step: where to stop, exclusive; None never stops.
          sharding: of every array of the batch, `[batch, length]`; None uses the default device.
          prefetch: batches that wait at most, at least 1.
        """
        self._batches = batches
        self._steps = first_step, last_step
        self._sharding = sharding
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(max(1, prefetch))
        self._stopping = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="seqeff-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._finished:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, tuple):
            return item
        self.close()
        if item is not None:
            raise item
        raise StopIteration

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread and drops the batches that wait; further iteration stops at once."""
        self._finished = True
        self._stopping.set()
        self._thread.join()
        while not self._ready.empty():
            self._ready.get_nowait()

    def _run(self) -> None:
        step, last_step = self._steps
        try:
            while not self._stopping.is_set() and step != last_step:
                self._put(self._load(step))
                step += 1
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=_STOP_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _load(self, step: int) -> Batch:
        if self._sharding is None:
            return jax.device_put(self._batches.rows(step, 0, self._batches.batch_size))
        return place(self._batches, step, self._sharding)


def place(batches: RowSource, step: int, sharding: jax.sharding.Sharding) -> Batch:
    """A step's batch as global arrays; this process reads the rows that its devices hold.

    Raises:
      ConfigError: the batch does not divide among the devices.
    """
    shape = batches.batch_size, batches.sequence_length
    try:
        slices = sharding.addressable_devices_indices_map(shape).values()
    except ValueError as error:
        raise ConfigError(
            f"Data.batch_size = {shape[0]} by Data.sequence_length = {shape[1]} does not divide "
            f"among the devices: {error}"
        ) from error
    bounds = [index[0].indices(shape[0]) for index in slices if index is not None]
    start, stop = min(bound[0] for bound in bounds), max(bound[1] for bound in bounds)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array, shape),
        batches.rows(step, start, stop),
    )
