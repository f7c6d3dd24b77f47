"""How many tokens a second the batches of a store deliver."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from seqeff.data.batches import Batches, Packing
from seqeff.data.build import SHARD_TOKENS, PartWriter
from seqeff.data.loader import Loader
from seqeff.data.store import MANIFEST, Manifest, TokenStore

_VOCABULARY = 50_304
_GROUP_TOKENS = 1 << 20


class BatchSpeed(NamedTuple):
    """One measurement.

    Attributes:
      mean_document_length: tokens, of geometrically distributed lengths.
      packing: of the rows.
      shards: files of the store.
      index_seconds: to order and pack the documents of one epoch.
      host_tokens_per_second: from the shards to numpy batches, on one thread.
      device_tokens_per_second: through a `Loader` to the default device.
    """

    mean_document_length: int
    packing: str
    shards: int
    index_seconds: float
    host_tokens_per_second: float
    device_tokens_per_second: float


def benchmark_batches(
    *,
    mean_document_lengths: tuple[int, ...] = (30, 1000, 100_000),
    packings: tuple[Packing, ...] = ("split", "whole"),
    tokens: int = 1 << 27,
    shard_tokens: int = SHARD_TOKENS // 4,
    sequence_length: int = 2048,
    batch_size: int = 32,
    steps: int = 100,
) -> list[BatchSpeed]:
    """Measures synthetic stores of random tokens, with documents told apart.

    The rates are medians over the steps on the host, and over the whole run on the device.

    Args:
      mean_document_lengths: one store each.
      packings: each is measured on every store.
      tokens: of a store.
      shard_tokens: entries of a shard at most.
      sequence_length: positions of a row.
      batch_size: rows of a batch.
      steps: batches that are timed.
    """
    speeds = []
    for mean_document_length in mean_document_lengths:
        with tempfile.TemporaryDirectory() as directory:
            store = _store(Path(directory), tokens, mean_document_length, shard_tokens)
            for packing in packings:
                batches = Batches(
                    [store],
                    sequence_length=sequence_length,
                    batch_size=batch_size,
                    seed=0,
                    packing=packing,
                )
                begin = time.perf_counter()
                batches(0)
                index_seconds = time.perf_counter() - begin
                batch_tokens = sequence_length * batch_size
                speeds.append(
                    BatchSpeed(
                        mean_document_length=mean_document_length,
                        packing=packing,
                        shards=len(store.shards),
                        index_seconds=index_seconds,
                        host_tokens_per_second=batch_tokens / _host_seconds(batches, steps),
                        device_tokens_per_second=batch_tokens / _device_seconds(batches, steps),
                    )
                )
    return speeds


def _host_seconds(batches: Batches, steps: int) -> float:
    times = []
    for step in range(steps):
        begin = time.perf_counter()
        batches(step)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _device_seconds(batches: Batches, steps: int) -> float:
    with Loader(batches, last_step=steps) as loader:
        jax.block_until_ready(next(loader))
        begin = time.perf_counter()
        for batch in loader:
            jax.block_until_ready(batch)
        return (time.perf_counter() - begin) / (steps - 1)


def _store(directory: Path, tokens: int, mean_length: int, shard_tokens: int) -> TokenStore:
    generator = np.random.default_rng(0)
    writer = PartWriter(directory / "train", "uint16", 0, shard_tokens)
    written = 0
    while written < tokens:
        count = max(1, _GROUP_TOKENS // mean_length)
        lengths = 1 + generator.geometric(1 / mean_length, count).astype(np.int32)
        entries = generator.integers(1, _VOCABULARY, lengths.sum())
        entries[np.cumsum(lengths) - lengths] = 0
        writer.append(entries, lengths, np.zeros(count, np.int32))
        written += len(entries)
    part = writer.finish(content="", text_bytes=0)
    manifest = Manifest(
        tokenizer="", begin_of_text=0, dtype="uint16", source={}, holdout=0.0, parts={"train": part}
    )
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return TokenStore(directory, "train")
