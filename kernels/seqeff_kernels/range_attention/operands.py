"""Sources as the GPU kernels take them: each array once, packed on the way, gradients added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from seqeff_kernels import gpu, tuning
from seqeff_kernels.range_attention.packing import PackedIndices, ungather
from seqeff_kernels.range_attention.packing import gather as gather_portably
from seqeff_kernels.range_attention.sources import ListedSource, RangeSource, Source, TokenSource

# what kernels read of a packed source lies below a multiple of it, so this much is written
LARGEST_TILE = 256
_GATHER_TILE = (16, 512)


class Operand(NamedTuple):
    """A source; keys and values are None where those of another source serve."""

    queries: Float[Array, "batch rows heads head_dim"] | None
    keys: Float[Array, "batch entries_or_tokens kv_heads head_dim"] | None
    values: Float[Array, "batch entries_or_tokens kv_heads head_dim"] | None
    start: Int[Array, "batch_or_1 kv_heads_or_1 rows"]
    end: Int[Array, "batch_or_1 kv_heads_or_1 rows"]
    packed: PackedIndices | None


@dataclass(frozen=True)
class Static:
    """What of a source is known while tracing.

    Attributes:
      tokens: which source holds the keys and values: the source itself or, for a packed source,
        perhaps another, so that their gradients are added in place.
      entries: number of entries.
      clean: whether no entry is NaN that no row attends.
      window: most entries that a row attends, if known.
    """

    tokens: int
    entries: int
    clean: bool
    window: int | None


def operands(
    queries: Array, sources: Sequence[Source]
) -> tuple[tuple[Operand, ...], tuple[Static, ...]]:
    """The sources' operands, in which no array of keys or values occurs twice."""
    rows = queries.shape[1]
    made, static = [], []
    for index, source in enumerate(sources):
        packed = source.packed if isinstance(source, RangeSource) else None
        sharing = [
            other
            for other, candidate in enumerate(sources)
            if packed is not None
            and isinstance(candidate, TokenSource)
            and candidate.keys is source.keys
            and candidate.values is source.values
        ]
        tokens = sharing[0] if sharing else index
        keys, values = (None, None) if sharing else (source.keys, source.values)
        start, end = jnp.broadcast_arrays(*source.bounds(rows))
        window = source.window if isinstance(source, TokenSource) else None
        made.append(Operand(source.queries, keys, values, start, end, packed))
        static.append(Static(tokens, source.entries, source.is_clean(rows), window))
    return tuple(made), tuple(static)


def gathered(
    made: Sequence[Operand], static: Sequence[Static], *, finite: bool = False
) -> list[ListedSource]:
    """The sources with their own keys and values: those of packed sources are gathered.

    With `finite`, no entry that a kernel reads is NaN or infinite because no row attends it; of a
    packed source, whose chosen tokens are finite, the gather clears what lies after them.
    """
    listed = []
    for operand, known in zip(made, static, strict=True):
        tokens = made[known.tokens]
        assert tokens.keys is not None and tokens.values is not None
        if operand.packed is not None:
            keys, values = _gather(tokens.keys, tokens.values, operand.packed)
        elif finite and not known.clean:
            attended = _attended(operand, known.entries)
            keys, values = (jnp.where(attended, x, 0) for x in (tokens.keys, tokens.values))
        else:
            keys, values = tokens.keys, tokens.values
        listed.append(ListedSource(operand.queries, keys, values, operand.start, operand.end))
    return listed


def token_gradients(
    made: Sequence[Operand],
    static: Sequence[Static],
    gradients: Sequence[tuple[Array, Array]],
) -> list[tuple[Array, Array] | tuple[None, None]]:
    """Gradients of the operands' keys and values from those of the gathered sources'."""
    totals: dict[int, tuple[Array, Array]] = {
        index: gradient
        for index, (operand, gradient) in enumerate(zip(made, gradients, strict=True))
        if operand.packed is None
    }
    for operand, known, gradient in zip(made, static, gradients, strict=True):
        if operand.packed is None:
            continue
        if known.tokens in totals:
            totals[known.tokens] = _add(totals[known.tokens], gradient, operand.packed)
        else:
            keys, values = (ungather(x, operand.packed.count) for x in gradient)
            totals[known.tokens] = keys, values
    return [totals.get(index, (None, None)) for index in range(len(made))]


def _gather(keys: Array, values: Array, packed: PackedIndices) -> tuple[Array, Array]:
    """Entries after the last chosen token are 0, at least up to a multiple of LARGEST_TILE."""
    if gpu.triton_obstacle():
        chosen = jnp.arange(packed.indices.shape[1]) < packed.count[:, -1:]
        keys, values = (
            jnp.where(chosen[..., None, None], gather_portably(x, packed), 0)
            for x in (keys, values)
        )
        return keys, values
    from seqeff_kernels.range_attention import packing_kernels

    like = jax.ShapeDtypeStruct(
        (keys.shape[0], packed.indices.shape[1], *keys.shape[2:]), keys.dtype
    )
    packed_keys, packed_values = gpu.triton_call(
        packing_kernels.gather,
        [keys, values, *packed],
        [like, like],
        CLEARED=LARGEST_TILE,
        **_launch(keys, packed),
    )
    return packed_keys, packed_values


def _add(
    totals: tuple[Array, Array], gradient: tuple[Array, Array], packed: PackedIndices
) -> tuple[Array, Array]:
    if gpu.triton_obstacle():
        keys, values = (
            total + ungather(x, packed.count) for total, x in zip(totals, gradient, strict=True)
        )
        return keys, values
    from seqeff_kernels.range_attention import packing_kernels

    keys, values = gpu.triton_call(
        packing_kernels.add,
        [*totals, *gradient, *packed],
        [jax.ShapeDtypeStruct(total.shape, total.dtype) for total in totals],
        aliases={0: 0, 1: 1},
        **_launch(totals[0], packed),
    )
    return keys, values


def _launch(tokens: Array, packed: PackedIndices) -> dict:
    batch, length, kv_heads, head_dim = tokens.shape
    capacity, features = packed.indices.shape[1], kv_heads * head_dim
    block_entries, block_features = _GATHER_TILE
    block_features = min(block_features, tuning.power_of_two(features))
    return {
        "grid": (-(-capacity // block_entries), -(-features // block_features), batch),
        "num_warps": 4,
        "num_stages": 1,
        "TOKENS": length,
        "CAPACITY": capacity,
        "FEATURES": features,
        "BLOCK_ENTRIES": block_entries,
        "BLOCK_FEATURES": block_features,
    }


def _attended(operand: Operand, entries: int) -> Bool[Array, "batch_or_1 entries kv_heads_or_1 1"]:
    """Whether some row attends each entry: the first row that ends after it, if any."""
    rows = operand.start.shape[-1]
    entry = jnp.arange(entries)

    def of_line(start, end):
        row = jnp.searchsorted(end, entry, side="right")
        return (row < rows) & (start[jnp.minimum(row, rows - 1)] <= entry)

    attended = jax.vmap(jax.vmap(of_line))(operand.start, operand.end)
    return jnp.swapaxes(attended, 1, 2)[..., None]
