"""Random calls of range_attention, and an oracle that shares no code with any backend."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from seqeff_kernels import RangeSource, Source


def make_call(
    seed: int,
    *,
    batch: int = 2,
    rows: int = 63,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    entries: tuple[int, ...] = (63,),
    per_kv_head: bool = False,
    own_queries: bool = False,
    poison: bool = False,
) -> tuple[np.ndarray, tuple[RangeSource, ...]]:
    """Queries and sources with random monotone bounds, of which some are empty.

    With `own_queries` the first source brings its own; with `poison`, entries that no row attends
    are NaN.
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    sources = []
    for count in entries:
        keys, values = (normal(batch, count, kv_heads, head_dim) for _ in range(2))
        bounds_shape = (batch, kv_heads, rows) if per_kv_head else (batch, rows)
        start, end = (
            np.sort(random.integers(0, count + 1, bounds_shape), -1).astype(np.int32)
            for _ in range(2)
        )
        lift = random.integers(0, count // 2 + 1)
        end = np.minimum(end + lift, count).astype(np.int32)
        if poison:
            each_head = np.broadcast_to(
                mask_of(start, end, count).any(-2).reshape(batch, -1, count),
                (batch, kv_heads, count),
            )
            outside = ~np.swapaxes(each_head, 1, 2)
            keys[outside], values[outside] = np.nan, np.nan
        own = normal(batch, rows, heads, head_dim) if own_queries and not sources else None
        sources.append(RangeSource(keys, values, start, end, own))
    return normal(batch, rows, heads, head_dim), tuple(sources)


def mask_of(start: np.ndarray, end: np.ndarray, entries: int) -> np.ndarray:
    """Which entries each row attends."""
    entry = np.arange(entries)
    return (start[..., None] <= entry) & (entry < end[..., None])


def dense_softmax(
    queries: np.ndarray, sources: tuple[Source, ...], masks: list[np.ndarray], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """One row at a time, in float64; masks are [batch, kv_heads or 1, rows, entries]."""
    batch, rows, heads, _ = queries.shape
    output = np.zeros(queries.shape)
    logsumexp = np.full((batch, rows, heads), -np.inf)
    for b, i, h in np.ndindex(batch, rows, heads):
        scores, values = [], []
        for source, mask in zip(sources, masks, strict=True):
            head = h // (heads // source.keys.shape[2])
            attended = mask[b, head % mask.shape[1], i]
            own = queries if source.queries is None else source.queries
            keys = np.asarray(source.keys, np.float64)[b, attended, head]
            scores.append(keys @ np.asarray(own, np.float64)[b, i, h] * scale)
            values.append(np.asarray(source.values, np.float64)[b, attended, head])
        scores, values = np.concatenate(scores), np.concatenate(values)
        if scores.size:
            logsumexp[b, i, h] = np.logaddexp.reduce(scores)
            output[b, i, h] = np.exp(scores - logsumexp[b, i, h]) @ values
    return output, logsumexp


@pytest.fixture(scope="session")
def call() -> Callable[..., tuple[np.ndarray, tuple[RangeSource, ...]]]:
    return make_call


@pytest.fixture(scope="session")
def oracle() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    return dense_softmax
