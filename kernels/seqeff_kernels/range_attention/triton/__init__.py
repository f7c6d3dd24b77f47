"""Triton kernels for NVIDIA GPUs from compute capability 8.0 on; see README.md.

The forward pass is one kernel; the backward is one for the queries' gradients and one a source for
its entries'. Each output element is written by one program, so gradients are deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from seqeff_kernels import gpu, tuning
from seqeff_kernels.range_attention.execution import Execution, Walk
from seqeff_kernels.range_attention.operands import (
    Static,
    gathered,
    operands,
    token_gradients,
)
from seqeff_kernels.range_attention.packing import PackedIndices
from seqeff_kernels.range_attention.sources import ListedSource, RangeSource, Source
from seqeff_kernels.range_attention.visits import row_tile_visits

_LARGEST_HEAD_DIM = 256
_MOST_SOURCES = 3
# head sizes with their dtypes, and devices, on which experiments/gpu_checks/attention.py has passed
TESTED = frozenset(itertools.product((64, 80, 96, 128, 256), ("bfloat16", "float16")))
TESTED_CAPABILITIES = ((9, 0),)
# of shared memory, that gradients take with heads of 256; cards other than Hopper's may have less
_WIDE_GRADIENT_BYTES = 165 * 1024
# above every entry, with room for adding a tile
_NOWHERE = 1 << 30


@dataclass(frozen=True)
class Tiles:
    """How one kernel is tiled.

    Attributes:
      rows: query rows of a tile.
      entries: entries of a tile.
      warps: warps of a program.
      stages: tiles in flight.
      full: whether tiles that need no mask get a loop of their own, without the mask's work; else
        every tile goes through one loop, which pays where there are few.
    """

    rows: int
    entries: int
    warps: int
    stages: int
    full: bool = True


@dataclass(frozen=True)
class Plan:
    """Tiles of the kernels; entries' gradients apart for packed sources and others."""

    forward: Tiles
    queries_gradient: Tiles
    packed_gradient: Tiles
    entries_gradient: Tiles


def obstacle(queries: Array, sources: tuple[Source, ...]) -> str | None:
    """Why this backend cannot serve, or None."""
    return gpu.triton_obstacle() or shape_obstacle(queries, sources)


def shape_obstacle(queries: Array, sources: tuple[Source, ...]) -> str | None:
    """Why the kernels cannot serve these shapes and dtypes on any device, or None."""
    if len(sources) > _MOST_SOURCES:
        return f"it serves up to {_MOST_SOURCES} sources, not {len(sources)}"
    arrays = [
        queries,
        *(x for s in sources for x in (s.queries, s.keys, s.values) if x is not None),
    ]
    dtypes = {str(array.dtype) for array in arrays}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16", "float32"}:
        return f"it needs one of bfloat16, float16, float32 throughout, not {sorted(dtypes)}"
    if queries.shape[-1] % 8 or queries.shape[-1] > _LARGEST_HEAD_DIM:
        return f"head_dim {queries.shape[-1]} is not a multiple of 8 up to {_LARGEST_HEAD_DIM}"
    if any(math.prod(array.shape[1:]) >= 2**31 for array in arrays):
        return "a row of the batch has 2^31 elements or more"
    return None


def plan(head_dim: int, dtype: str) -> Plan:
    """Tiles for what no table lists."""
    if dtype == "float32":
        small = Tiles(64, 32, 4, 2)
        return Plan(small, small, Tiles(32, 64, 4, 2), Tiles(32, 64, 4, 2))
    if head_dim > 128:
        # with the tiles of smaller heads, accumulators do not fit in registers
        queries = Tiles(64, 32, 4, 4, full=False)
        packed, entries = Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)
        if gpu.shared_memory() < _WIDE_GRADIENT_BYTES:
            queries = Tiles(32, 32, 4, 2, full=False)
            packed, entries = Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 2)
        return Plan(Tiles(64, 32, 4, 2), queries, packed, entries)
    if head_dim > 64:
        entries = Tiles(32, 64, 4, 3)
        return Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), entries, entries)
    entries = Tiles(64, 64, 4, 3)
    return Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), entries, entries)


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: tuple[Source, ...],
    scale: float,
    tiles: Plan | None = None,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `range_attention`; `tiles` replaces those of `chosen_plan`, for tuning."""
    made, static = operands(queries, sources)
    tiles = tiles or chosen_plan(queries, sources)
    output, logsumexp = cast(tuple[Array, Array], _attend(queries, made, scale, static, tiles))
    return output, jnp.swapaxes(logsumexp, 1, 2)


def chosen_plan(queries: Array, sources: tuple[Source, ...]) -> Plan:
    """The tiles that the table lists, or those of `plan`."""
    return tuning.planned(
        "attention",
        "triton",
        tuning.attention_key(queries, sources),
        lambda **kernels: Plan(**{kernel: Tiles(**sizes) for kernel, sizes in kernels.items()}),
        lambda: plan(queries.shape[-1], str(queries.dtype)),
    )


def execution(queries: Array, sources: tuple[Source, ...]) -> Execution:
    """How this backend serves a call."""
    chosen = chosen_plan(queries, sources)
    forward, backward = [], []
    for index, source in enumerate(sources):
        packed = isinstance(source, RangeSource) and source.packed is not None
        entries = chosen.packed_gradient if packed else chosen.entries_gradient
        rows = chosen.queries_gradient
        forward.append(Walk(index, chosen.forward.rows, chosen.forward.entries, 2))
        # scores and the weights' gradient are in both kernels of the backward pass
        backward.append(Walk(index, rows.rows, rows.entries, 3))
        backward.append(Walk(index, entries.rows, entries.entries, 4))
    return Execution(
        backend="triton",
        plan=dataclasses.asdict(chosen),
        deterministic=True,
        forward=forward,
        backward=backward,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(queries, made, scale, static, tiles):
    return _forward(queries, gathered(made, static), scale, static, tiles.forward)


def _attend_forward(queries, made, scale, static, tiles):
    # named so that a rematerialisation policy can keep them, and the backward alone runs again
    outputs = checkpoint_name(_attend(queries, made, scale, static, tiles), "range_attention")
    return outputs, (queries, made, outputs)


def _attend_backward(scale, static, tiles, saved, gradients):
    queries, made, outputs = saved
    sources = gathered(made, static)
    output_gradient = gradients[0].astype(queries.dtype)
    shared, own, delta = _queries_gradients(
        queries,
        sources,
        outputs,
        (output_gradient, gradients[1]),
        scale,
        static,
        tiles.queries_gradient,
    )
    entries = [
        _entries_gradients(
            queries,
            source,
            operand.packed,
            (output_gradient, outputs[1], delta),
            scale,
            known,
            tiles.entries_gradient if operand.packed is None else tiles.packed_gradient,
        )
        for source, operand, known in zip(sources, made, static, strict=True)
    ]
    return shared, tuple(
        # None: integers have no gradient
        operand._replace(
            queries=own_gradient, keys=keys, values=values, start=None, end=None, packed=None
        )
        for operand, own_gradient, (keys, values) in zip(
            made, own, token_gradients(made, static, entries), strict=True
        )
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    queries: Array,
    sources: Sequence[ListedSource],
    scale: float,
    static: tuple[Static, ...],
    tiles: Tiles,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch heads rows"]]:
    batch, rows, heads, _ = queries.shape
    output, logsumexp = gpu.triton_call(
        _kernel("forward"),
        [queries, *_pointers(queries, sources, tiles.rows)],
        [
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ],
        grid=(heads, -(-rows // tiles.rows), batch),
        **_constants(queries, sources, scale, static, tiles),
    )
    return output, logsumexp


def _queries_gradients(
    queries: Array,
    sources: Sequence[ListedSource],
    outputs: tuple[Array, Array],
    gradients: tuple[Array, Array],
    scale: float,
    static: tuple[Static, ...],
    tiles: Tiles,
) -> tuple[Array, list[Array | None], Float[Array, "batch heads rows"]]:
    """Gradients of the queries and of the sources' own; and the rows' delta."""
    batch, rows, heads, _ = queries.shape
    owners = [source.queries is not None for source in sources]
    written = len(sources) if any(owners) else 1
    like_queries = jax.ShapeDtypeStruct(queries.shape, queries.dtype)
    unused = jax.ShapeDtypeStruct((1,), queries.dtype)
    *found, delta = gpu.triton_call(
        _kernel("queries_gradient"),
        [queries, *_pointers(queries, sources, tiles.rows), *outputs, *gradients],
        [
            *(like_queries if index < written else unused for index in range(_MOST_SOURCES)),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ],
        grid=(heads, -(-rows // tiles.rows), batch),
        **_constants(queries, sources, scale, static, tiles),
    )
    if not any(owners):
        return found[0], [None] * len(sources), delta
    pairs = list(zip(found, owners, strict=False))
    shared = sum((gradient for gradient, owner in pairs if not owner), jnp.zeros_like(queries))
    return shared, [gradient if owner else None for gradient, owner in pairs], delta


def _entries_gradients(
    queries: Array,
    source: ListedSource,
    packed: PackedIndices | None,
    rows: tuple[Array, Array, Array],
    scale: float,
    static: Static,
    tiles: Tiles,
) -> tuple[Array, Array]:
    """Gradients of a source's entries; `rows` are output gradient, logsumexp and delta."""
    batch, entries, kv_heads, head_dim = source.keys.shape
    visits = _row_visits(source, entries, tiles.rows, tiles.entries)
    like_entries = jax.ShapeDtypeStruct(source.keys.shape, source.keys.dtype)
    keys, values = gpu.triton_call(
        _kernel("entries_gradient"),
        [
            queries if source.queries is None else source.queries,
            *source[1:],
            visits,
            *rows,
            visits if packed is None else packed.count,
        ],
        [like_entries, like_entries],
        grid=(kv_heads, visits.shape[2], batch),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        SCALE=scale,
        BOUND_BATCHES=source.start.shape[0],
        BOUND_HEADS=source.start.shape[1],
        ENTRIES=entries,
        FULL_TILES=_has_full_tiles(static, tiles),
        IS_PACKED=packed is not None,
        TOKENS=0 if packed is None else packed.count.shape[1],
        ROWS=queries.shape[1],
        HEADS=queries.shape[2],
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=_block_dim(head_dim),
        BLOCK_ROWS=tiles.rows,
        BLOCK_ENTRIES=tiles.entries,
    )
    return keys, values


def _entry_visits(
    source: ListedSource, tile_rows: int
) -> Int[Array, "batch_or_1 kv_heads_or_1 row_tiles 4"]:
    """The entries that each tile of rows touches, and inside them those that all its rows attend.

    First, first of those, after the last of those, after the last.
    """
    missing = -source.start.shape[-1] % tile_rows

    def tiled(bound):
        bound = jnp.pad(bound, ((0, 0), (0, 0), (0, missing)), mode="edge")
        return bound.reshape(*bound.shape[:2], -1, tile_rows)

    start, end = tiled(source.start), tiled(source.end)
    occupied = start < end
    # a row that attends nothing leaves no entry that all attend
    start, end = jnp.where(occupied, start, _NOWHERE), jnp.where(occupied, end, 0)
    return jnp.stack([start.min(-1), start.max(-1), end.min(-1), end.max(-1)], -1)


def _row_visits(
    source: ListedSource, entries: int, tile_rows: int, tile_entries: int
) -> Int[Array, "batch_or_1 kv_heads_or_1 entry_tiles 4"]:
    """The rows that touch each tile of entries, and inside them those that attend all of it.

    First, first of those, after the last of those, after the last, of whole tiles of rows.
    """
    first = jnp.arange(0, entries, tile_entries)
    last = jnp.minimum(first + tile_entries, entries)
    missing = ((0, 0), (0, 0), (0, -source.end.shape[-1] % tile_rows))
    # a tile that is cut off by the last row needs a mask
    start = jnp.pad(source.start, missing, constant_values=_NOWHERE)
    end = jnp.pad(source.end, missing, mode="edge")
    return tile_rows * row_tile_visits(start, end, first, last, tile_rows)


def _pointers(queries: Array, sources: Sequence[ListedSource], tile_rows: int) -> list[Array]:
    """Queries, keys, values, bounds and visits of each source; absent sources repeat the first."""
    pointers = [
        pointer
        for source in sources
        for pointer in (
            queries if source.queries is None else source.queries,
            *source[1:5],
            _entry_visits(source, tile_rows),
        )
    ]
    return pointers + pointers[: len(pointers) // len(sources)] * (_MOST_SOURCES - len(sources))


def _constants(
    queries: Array,
    sources: Sequence[ListedSource],
    scale: float,
    static: tuple[Static, ...],
    tiles: Tiles,
) -> dict[str, Any]:
    _, rows, heads, head_dim = queries.shape
    absent = _MOST_SOURCES - len(sources)
    sources = (*sources, *[sources[0]] * absent)
    full_tiles = [_has_full_tiles(source, tiles) for source in static]
    return {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "SCALE": scale,
        "SOURCES": len(static),
        "OWN_QUERIES": any(source.queries is not None for source in sources),
        "BOUND_BATCHES": tuple(source.start.shape[0] for source in sources),
        "BOUND_HEADS": tuple(source.start.shape[1] for source in sources),
        "ENTRIES": tuple(source.entries for source in (*static, *static[:1] * absent)),
        "FULL_TILES": (*full_tiles, *[False] * absent),
        "CLEAN": tuple(source.clean for source in static),
        "ROWS": rows,
        "HEADS": heads,
        "KV_HEADS": sources[0].keys.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": _block_dim(head_dim),
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_ENTRIES": tiles.entries,
    }


def _has_full_tiles(static: Static, tiles: Tiles) -> bool:
    """Whether a loop for full tiles is made; a short window has none, as its edges slide."""
    if not tiles.full:
        return False
    return static.window is None or static.window >= tiles.rows + tiles.entries - 1


def _block_dim(head_dim: int) -> int:
    """The power of two that holds a head, at least the tensor cores' depth."""
    return max(16, tuning.power_of_two(head_dim))


def _kernel(name: str) -> Any:
    # they need triton, which the portable form does without
    from seqeff_kernels.range_attention.triton import forward, gradients

    return getattr(forward if name == "forward" else gradients, name)
