"""Named shapes of separator attention, and inputs for them, for tests, tuning and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, DTypeLike, Float, Int

from seqeff_kernels.range_attention.packing import PackedIndices, pack
from seqeff_kernels.range_attention.sources import RangeSource, Source, TokenSource

# what is attended: packed initial tokens and separators, and a window; of the separators the latest
# ones alone; either in positions that are ranks ("compact"); a window alone; every earlier token
KINDS = ("separators", "bounded", "compact", "bounded-compact", "window", "causal")
# separators that a row attends, where they are bounded
BOUND = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A call of separator attention.

    Attributes:
      length: tokens in a row of the batch.
      density: the fraction of tokens that are separators; 0.1152 is that of the Pile with the
        SepLLM paper's list.
      initial: tokens at the beginning that every later token attends.
      window: nearest tokens that a token attends, itself included.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    density: float = 0.1152
    initial: int = 3
    window: int = 64


SHAPES = {
    "quickstart": Shape(batch=16, length=256, heads=4, kv_heads=4, head_dim=64),
    "odd": Shape(batch=2, length=1000, heads=4, kv_heads=2, head_dim=16, window=63),
    "multi-query": Shape(batch=3, length=63, heads=4, kv_heads=1, head_dim=8, window=7),
    "pythia-160m-2k": Shape(batch=16, length=2048, heads=12, kv_heads=12, head_dim=64),
    "pythia-160m-8k": Shape(batch=4, length=8192, heads=12, kv_heads=12, head_dim=64),
    "pythia-160m-32k": Shape(batch=1, length=32768, heads=12, kv_heads=12, head_dim=64),
    "grouped-2k": Shape(batch=16, length=2048, heads=32, kv_heads=8, head_dim=128),
    "grouped-8k": Shape(batch=4, length=8192, heads=32, kv_heads=8, head_dim=128),
    "grouped-32k": Shape(batch=1, length=32768, heads=32, kv_heads=8, head_dim=128),
    "wide-2k": Shape(batch=16, length=2048, heads=16, kv_heads=16, head_dim=128),
    "wide-8k": Shape(batch=4, length=8192, heads=16, kv_heads=16, head_dim=128),
    "wide-32k": Shape(batch=1, length=32768, heads=16, kv_heads=16, head_dim=128),
    "pythia-160m-128k": Shape(batch=1, length=131072, heads=12, kv_heads=12, head_dim=64),
    "grouped-128k": Shape(batch=1, length=131072, heads=32, kv_heads=8, head_dim=128),
    "wide-128k": Shape(batch=1, length=131072, heads=16, kv_heads=16, head_dim=128),
    # a fifth of the tokens are separators, with every head size
    **{
        f"{name}-4k-fifth": Shape(
            batch=8, length=4096, heads=heads, kv_heads=kv_heads, head_dim=head_dim, density=0.2
        )
        for name, heads, kv_heads, head_dim in (
            ("wide", 16, 16, 128),
            ("pythia-160m", 12, 12, 64),
            ("grouped", 32, 8, 128),
            ("head-80", 16, 16, 80),
            ("head-96", 16, 16, 96),
            ("head-256", 8, 8, 256),
        )
    },
}


def tokens(
    shape: Shape, seed: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[
    Float[Array, "batch length heads head_dim"],
    Float[Array, "batch length kv_heads head_dim"],
    Float[Array, "batch length kv_heads head_dim"],
    Bool[Array, "batch length"],
]:
    """Random queries, keys and values, and which tokens are initial or separators."""
    *seeds, chosen_seed = jax.random.split(jax.random.key(seed), 4)
    queries, keys, values = (
        jax.random.normal(s, (shape.batch, shape.length, heads, shape.head_dim), dtype)
        for s, heads in zip(seeds, (shape.heads, shape.kv_heads, shape.kv_heads), strict=True)
    )
    chosen = jax.random.bernoulli(chosen_seed, shape.density, (shape.batch, shape.length))
    return queries, keys, values, chosen.at[:, : shape.initial].set(True)


class PackedList(NamedTuple):
    """A packed list of tokens, and each row's range of it."""

    packed: PackedIndices
    start: Int[Array, "batch rows"]
    end: Int[Array, "batch rows"]


def packed_lists(
    kind: str, chosen: Bool[Array, "batch length"], initial: int, window: int | None
) -> tuple[PackedList, ...]:
    """The lists that a kind of attention attends beside its window; all layers share them."""
    if kind in ("window", "causal"):
        return ()
    assert window is not None
    if not kind.startswith("bounded"):
        return (_packed_list(chosen, window),)
    is_initial = jnp.arange(chosen.shape[1]) < initial
    others = _packed_list(chosen & ~is_initial, window)
    return (
        _packed_list(chosen & is_initial, window),
        others._replace(start=jnp.maximum(others.end - BOUND, 0)),
    )


def kind_sources(
    kind: str,
    queries: Float[Array, "batch length heads head_dim"],
    keys: Float[Array, "batch length kv_heads head_dim"],
    values: Float[Array, "batch length kv_heads head_dim"],
    lists: Sequence[PackedList],
    window: int | None,
) -> tuple[Source, ...]:
    """The sources of a kind of attention; where it is "compact", negated heads stand for turned."""
    own, turned = (-queries, -keys) if kind.endswith("compact") else (None, keys)
    far = [
        RangeSource(turned, values, start, end, own, packed=packed) for packed, start, end in lists
    ]
    return *far, TokenSource(keys, values, window=window)


def separator_sources(
    keys: Float[Array, "batch length kv_heads head_dim"],
    values: Float[Array, "batch length kv_heads head_dim"],
    chosen: Bool[Array, "batch length"],
    window: int,
    document_start: Int[Array, "batch length"] | None = None,
) -> tuple[RangeSource, TokenSource]:
    """SepLLM's attention: the chosen tokens at or before `i - window`, packed, and the window."""
    packed, start, end = _packed_list(chosen, window, document_start)
    return (
        RangeSource(keys, values, start, end, packed=packed),
        TokenSource(keys, values, document_start, window),
    )


def _packed_list(
    chosen: Bool[Array, "batch length"],
    window: int,
    document_start: Int[Array, "batch length"] | None = None,
) -> PackedList:
    packed = pack(chosen)
    counts = jnp.pad(packed.count, ((0, 0), (1, 0)))  # counts[t] of them lie before token t
    end = counts[:, jnp.maximum(jnp.arange(chosen.shape[1]) - window + 1, 0)]
    if document_start is None:
        return PackedList(packed, jnp.zeros_like(end), end)
    return PackedList(packed, jnp.take_along_axis(counts, document_start, axis=1), end)
