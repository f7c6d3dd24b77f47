"""Inputs of `range_attention` for `range_cases.py`.

They are adversarial: odd lengths, empty rows, NaN wherever nothing is attended. With `changed`,
the tokens from the middle of the rows on are others, and other ones are chosen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from seqeff_kernels import tuning
from seqeff_kernels.range_attention import RangeSource, Source, TokenSource, shapes

Inputs = tuple[Array, Sequence[Source]]


def dense(
    head_dim: int,
    dtype: str,
    window: int | None,
    length: int = 778,
    heads: int = 6,
    changed: bool = False,
) -> Inputs:
    """Causal attention, whole or in a window; grouped heads."""
    queries, keys, values, _ = _tokens(2, length, heads, 2, head_dim, dtype, changed)
    return queries, [TokenSource(keys, values, window=window)]


def separators(
    head_dim: int,
    dtype: str,
    heads: int = 8,
    kv_heads: int = 2,
    length: int = 1000,
    window: int = 63,
    changed: bool = False,
) -> Inputs:
    """Packed initial tokens and separators, and a window; grouped heads."""
    queries, keys, values, chosen = _tokens(2, length, heads, kv_heads, head_dim, dtype, changed)
    return queries, shapes.separator_sources(keys, values, chosen, window)


def unattended_separators(head_dim: int, dtype: str, changed: bool = False) -> Inputs:
    """Packed tokens that no row attends, more than a tile of them: all of the last window.

    What a kernel writes as their packed gradients is added to the tokens' gradients, and must be 0
    as the reference's is. A kernel that leaves it unwritten finds NaN in that memory.
    """
    window = 300
    queries, keys, values, chosen = _tokens(2, 1000, 4, 2, head_dim, dtype, changed)
    # the other row of the batch has fewer packed tokens, by tiles
    chosen = chosen.at[0, -window:].set(True)
    return queries, shapes.separator_sources(keys, values, chosen, window)


def many_blocks(head_dim: int, dtype: str, changed: bool = False) -> Inputs:
    """Several blocks of rows for every multiprocessor, so that a program does one after another."""
    queries, keys, values, chosen = _tokens(4, 1500, 16, 8, head_dim, dtype, changed)
    return queries, shapes.separator_sources(keys, values, chosen, 200)


def named(shape: str, dtype: str, changed: bool = False) -> Inputs:
    """A small one of the named shapes."""
    size = shapes.SHAPES[shape]
    sizes = size.batch, size.length, size.heads, size.kv_heads, size.head_dim
    queries, keys, values, chosen = _tokens(*sizes, dtype, changed)
    return queries, shapes.separator_sources(keys, values, chosen, size.window)


def documents(
    head_dim: int,
    dtype: str,
    padding: int = 100,
    batch: int = 2,
    heads: int = 4,
    changed: bool = False,
) -> Inputs:
    """Separators with packed documents, the first row padded on the left with NaN."""
    length = 777
    queries, keys, values, chosen = _tokens(batch, length, heads, heads, head_dim, dtype, changed)
    starts = np.repeat([[0, 150, 400, 401]], batch, 0)
    starts[0, 0] = padding
    token = np.arange(length)
    start = np.max(np.where(starts[..., None] <= token, starts[..., None], 0), axis=1)
    start[0, :padding] = padding
    real = jnp.asarray(token >= np.eye(batch, 1, dtype=int) * padding)
    keys, values = (jnp.where(real[..., None, None], x, jnp.nan) for x in (keys, values))
    return queries, shapes.separator_sources(
        keys, values, chosen & real, 100, jnp.asarray(start, jnp.int32)
    )


def random_bounds(
    head_dim: int,
    dtype: str,
    seed: int = 0,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    own_queries: int = 1,
) -> Inputs:
    """Three sources of random bounds, some with their own queries; empty rows; NaN in no range.

    Rows attend what they please: there are no later tokens.
    """
    rows, entries = 700, 515
    queries, keys, values, _ = _tokens(batch, rows, heads, kv_heads, head_dim, dtype)
    generator = np.random.default_rng((head_dim, seed))
    sources: list[Source] = []
    for index, lines in enumerate(((batch, kv_heads, rows), (batch, rows))):
        start, end = np.sort(generator.integers(0, entries, (2, *lines)), axis=-1)
        entry = np.arange(entries)[:, None]
        attended = ((start[..., None, :] <= entry) & (entry < end[..., None, :])).any(-1)
        attended = attended.swapaxes(1, 2) if index == 0 else attended[..., None]
        far_keys, far_values = (
            jnp.where(attended[..., None], x[:, :entries], jnp.nan) for x in (values, keys)
        )
        sources.append(RangeSource(far_keys, far_values, jnp.asarray(start), jnp.asarray(end)))
    sources.append(TokenSource(keys, values, window=33, row_offset=-300))
    for index in range(own_queries):
        own = jnp.roll(queries[:, ::-1], index, axis=1)
        sources[index] = dataclasses.replace(sources[index], queries=own)
    return queries, sources


def tuned(
    head_dim: int, dtype: str, group: int, kinds: str, length: int, changed: bool = False
) -> Inputs:
    """Sources of the kinds that a key of a table of tuned plans names.

    Raises:
      ValueError: the kinds are none that `seqeff_kernels.tune` writes.
    """
    sizes = 2, length, 2 * group, 2, head_dim
    queries, keys, values, chosen = _tokens(*sizes, dtype, changed)
    width = re.search(r"window(\d+)", kinds)
    window = int(width[1]) if width else None
    lists, own = kinds.count("packed"), "(own queries)" in kinds
    kind = {0: "causal" if window is None else "window", 1: "separators", 2: "bounded"}[lists]
    if own:
        kind = "compact" if lists == 1 else f"{kind}-compact"
    sources = shapes.kind_sources(
        kind, queries, keys, values, shapes.packed_lists(kind, chosen, 3, window), window
    )
    found = tuning.attention_key(queries, sources)
    if f" {kinds} " not in found:
        raise ValueError(f"there are no inputs of {kinds!r} here; the nearest are {found!r}")
    return queries, sources


def _tokens(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    changed: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Queries, keys, values, and which tokens are chosen, a fifth."""
    shape = shapes.Shape(
        batch=batch, length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, density=0.2
    )
    found = shapes.tokens(shape, seed=head_dim, dtype=dtype)
    if not changed:
        return found
    others = shapes.tokens(shape, seed=head_dim + 1, dtype=dtype)
    middle = (length + 1) // 2
    queries, keys, values, chosen = (
        jnp.concatenate([before[:, :middle], after[:, middle:]], axis=1)
        for before, after in zip(found, others, strict=True)
    )
    return queries, keys, values, chosen
