"""What the Mosaic kernels share: tables of visits, rings of tiles, products, roles of workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Int

from seqeff_kernels.range_attention.mosaic.tiles import BLOCK, Tiles
from seqeff_kernels.range_attention.sources import ListedSource

LOG2E = math.log2(math.e)
# finite, so that the difference of two of them is 0 and not NaN
LOWEST = -1.0e30
REGISTERS = {2: (232, 40), 3: (160, 32)}  # of a compute and of the copying worker


class Visits(NamedTuple):
    """The tiles that a block visits; those in [full_first, full_last) need no mask.

    A program copies [copied_first, copied_last), which holds the visits of all of its workers.
    """

    first: Any
    full_first: Any
    full_last: Any
    last: Any
    copied_first: Any
    copied_last: Any


def pad_to(array: Array, axis: int, multiple: int = 8, **how: Any) -> Array:
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths, **how)


def rows_of_program(tiles: Tiles) -> int:
    return tiles.block_rows * tiles.workers


def padded_bounds(source: ListedSource, tiles: Tiles) -> tuple[Array, Array]:
    """Bounds of a whole number of programs: the rows after the last one repeat it."""
    multiple = rows_of_program(tiles)
    start, end = (pad_to(b, 2, multiple, mode="edge") for b in (source.start, source.end))
    return start, end


def row_visits(
    start: Array, end: Array, entries: int, size: int, tiles: Tiles
) -> Int[Array, "batch_or_1 kv_heads_or_1 row_blocks 6"]:
    """The entry tiles that each block of rows visits."""
    start, end = (b.reshape(*b.shape[:2], -1, tiles.block_rows) for b in (start, end))
    occupied = start < end
    first = jnp.where(occupied, start, entries).min(-1) // size
    last = pl.cdiv(jnp.where(occupied, end, 0).max(-1), size)
    # a row that attends nothing here needs a mask in every tile
    full_first = jnp.where(occupied, pl.cdiv(start, size), entries).max(-1)
    full_last = jnp.where(occupied, end, 0).min(-1) // size
    return _table(first, full_first, full_last, last, tiles.workers)


def entry_visits(
    start: Array, end: Array, entries: int, size: int, workers: int
) -> Int[Array, "batch_or_1 kv_heads_or_1 entry_blocks 6"]:
    """The row tiles that each block of entries is attended by."""
    blocks = pl.cdiv(entries, BLOCK * workers) * workers
    low = jnp.arange(blocks)[:, None] * BLOCK
    high = jnp.minimum(low + BLOCK, entries)

    def count(condition):
        return condition.sum(-1, dtype=jnp.int32)

    # of a tile of rows, the first has the lowest bounds and the last the highest
    lowest_start, highest_start, lowest_end, highest_end = (
        b[:, :, None, offset::size] for b in (start, end) for offset in (0, size - 1)
    )
    return _table(
        count(highest_end <= low),
        count(lowest_end < high),
        count(highest_start <= low),
        count(lowest_start < high),
        workers,
    )


def _table(first, full_first, full_last, last, workers: int) -> Array:
    last = jnp.where(first < last, last, 0)

    def over_program(reduce, tile):
        grouped = tile.reshape(*tile.shape[:2], -1, workers)
        return jnp.repeat(reduce(grouped, axis=-1), workers, axis=-1)

    copied_last = over_program(jnp.max, last)
    visited = jnp.where(first < last, first, copied_last)
    copied_first = jnp.minimum(over_program(jnp.min, visited), copied_last)
    first = jnp.clip(visited, copied_first, copied_last)
    last = jnp.maximum(first, last)
    visits = Visits(first, full_first, full_last, last, copied_first, copied_last)
    return jnp.stack(visits, -1).astype(jnp.int32)


def bound_line(ref: Any, batch_index: Array, kv_head: Array) -> tuple[Array, Array]:
    """Where bounds of one or all batch rows and KV heads are."""
    zero = jnp.int32(0)
    return batch_index if ref.shape[0] > 1 else zero, kv_head if ref.shape[1] > 1 else zero


def read_visits(table_ref: Any, batch_index: Array, kv_head: Array, block: Array) -> Visits:
    line = bound_line(table_ref, batch_index, kv_head)
    return Visits(*(table_ref[(*line, block, i)] for i in range(6)))


def visit_all(visits: Visits, visit: Callable, skip: Callable, carry: Any) -> Any:
    """Visits the worker's tiles, and passes over those copied for the program's others."""

    def pass_over(tile, _):
        skip(tile)

    lax.fori_loop(visits.copied_first, visits.first, pass_over, None)
    carry = lax.fori_loop(visits.first, visits.last, visit, carry)
    lax.fori_loop(visits.last, visits.copied_last, pass_over, None)
    return carry


def copy_entries(streams, visits, copied, size, stages, batch_index, kv_head) -> None:
    """Copies the program's tiles, each stream into its ring as soon as a stage is free."""

    @pl.loop(visits.copied_first, visits.copied_last)
    def _(tile):
        step = copied + tile - visits.copied_first
        slot = lax.rem(step, jnp.int32(stages))
        for ref, smem, ready, free in streams:
            await_free(free, step, slot, stages)
            plgpu.copy_gmem_to_smem(
                ref.at[batch_index, pl.ds(tile * size, size), kv_head],
                smem.at[slot, pl.ds(0, size)],
                ready.at[slot],
            )


def await_free(free: Any, step: Array, slot: Array, stages: int) -> None:
    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(free.at[slot])


def await_all_free(barriers: Sequence[Any], steps: Array, stages: int) -> None:
    """Waits until the last tiles have been used, so that no barrier is left half observed."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        for free in barriers:
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(stages))])


def slot_index(before: Array, stages: int, tile: Array) -> Array:
    return lax.rem(before + tile, jnp.int32(stages))


def mask_edge(
    visits: Visits, tile: Array, scores: Array, entry: Callable, bounds: Callable, axis: int
) -> Array:
    """Scores, -inf where the entry lies outside the row's bounds; `axis` is the bounds'."""

    def masked(scores):
        start, end = (spread(b, scores, axis) for b in bounds())
        index = entry()
        return jnp.where((index >= start) & (index < end), scores, -jnp.inf)

    edge = (tile < visits.full_first) | (tile >= visits.full_last)
    return lax.cond(edge, masked, lambda scores: scores, scores)


def times_transposed(left: Any, right: Any, meanwhile: Callable = lambda: None) -> Array:
    """Product left @ right.T in float32, of shared memory; `meanwhile` runs before it is done."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
        meanwhile()
        return accumulator[...]

    shape = (left.shape[0], right.shape[0])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]


def add_product(total: Array, left: Array, right: Any) -> Any:
    """Adds left @ right, with left in registers and right in shared memory."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, left, right)

    return pl.run_state(multiply)(plgpu.ACC.init(total))  # pyright: ignore[reportPrivateImportUsage]


def filled(shape: tuple[int, ...], value: float) -> Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load_rows(ref: Any) -> Array:
    return plgpu.load(  # pyright: ignore[reportCallIssue]
        ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
    )


def load_columns(ref: Any) -> Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))  # pyright: ignore[reportCallIssue]


def spread(vector: Array, like: Array, axis: int) -> Array:
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def indices(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def roles(workers: int, worker: Array, compute: Callable, copy: Callable) -> None:
    more, fewer = REGISTERS.get(workers, (None, None))

    @pl.when(worker < workers)
    def _():
        if more is not None:
            plgpu.set_max_registers(more, action="increase")
        compute()

    @pl.when(worker == workers)
    def _():
        if fewer is not None:
            plgpu.set_max_registers(fewer, action="decrease")
        copy()


def threads(workers: int) -> dict[str, Any]:
    return {
        "num_threads": workers + 1,
        "thread_name": "worker",
        # no reduction crosses warps
        "compiler_params": plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    }


def shared_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
