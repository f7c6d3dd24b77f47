"""What the Mosaic kernels share: items of work, rings of tiles, products, roles of workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqeff_kernels import gpu
from seqeff_kernels.range_attention.mosaic.tiles import REDUCTION_BYTES

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

    @property
    def copied(self) -> Any:
        """How many tiles the program copies."""
        return self.copied_last - self.copied_first


def tile_visits(first: Any, full_first: Any, full_last: Any, last: Any, copied: Any) -> Visits:
    """Visits within the tiles that the program copies."""
    copied_first, copied_last = copied
    first = jnp.clip(first, copied_first, copied_last)
    return Visits(
        first, full_first, full_last, jnp.clip(last, first, copied_last), copied_first, copied_last
    )


def pad_to(array: Array, axis: int, multiple: int, **how: Any) -> Array:
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths, **how)


class Ring:
    """Stages in shared memory that the copying worker fills and the compute workers empty.

    What is copied in one step arrives together. Steps are counted over the life of the program.
    """

    def __init__(self, stages: int, buffers: Any, barriers: tuple[Any, Any]) -> None:
        self._stages, self.buffers = stages, buffers
        self._ready, self._free = barriers

    @staticmethod
    def scratch(stages: int, buffers: Any, copies: int, workers: int) -> tuple[Any, Any]:
        """What the constructor takes after `stages`; `copies` are made in each step."""
        return buffers, (
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        )

    def slot(self, step: Array) -> Array:
        """The stage of a step."""
        return lax.rem(step, jnp.int32(self._stages))

    def fill(self, step: Array, copies: Callable[[Array], Iterable[tuple[Any, Any]]]) -> None:
        """Makes the copies to a stage, given as (from, to), as soon as it is free."""
        slot = self.slot(step)

        @pl.when(step >= self._stages)
        def _():
            plgpu.barrier_wait(self._free.at[slot])

        for source, target in copies(slot):
            plgpu.copy_gmem_to_smem(source, target, self._ready.at[slot])

    def drain(self, steps: Array) -> None:
        """Waits until the last stages have been emptied: no barrier may be left half observed."""

        @pl.loop(jnp.maximum(steps - self._stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(self._free.at[self.slot(step)])

    def take(self, slot: Array) -> None:
        """Waits until a stage is filled."""
        plgpu.barrier_wait(self._ready.at[slot])

    def give(self, slot: Array) -> None:
        """Says that this worker is done with a stage."""
        plgpu.barrier_arrive(self._free.at[slot])

    def skip(self, slot: Array) -> None:
        """Passes over a stage that is filled for the program's other workers."""
        self.take(slot)
        self.give(slot)


def copy_tiles(
    refs: Sequence[Any],
    rings: Sequence[Ring],
    tiles: tuple[Array, Array],
    copied: Array,
    size: int,
    line: Callable[[Any, Any], Any],
) -> None:
    """Copies tiles of `size` entries, those of each array into its ring.

    Args:
      copied: steps of the rings before.
      line: a list of entries of an array.
    """
    first, last = tiles

    @pl.loop(first, last)
    def _(tile):
        for ref, ring in zip(refs, rings, strict=True):

            def copies(slot, ref=ref, ring=ring):
                source = line(ref, pl.ds(tile * size, size))
                yield source, ring.buffers.at[slot, pl.ds(0, size)]

            ring.fill(copied + tile - first, copies)


def visit_all(visits: Visits, visit: Callable, skip: Callable, carry: Any) -> Any:
    """Visits the worker's tiles, and passes over those copied for the program's others."""

    def pass_over(tile, _):
        skip(tile)

    lax.fori_loop(visits.copied_first, visits.first, pass_over, None)
    carry = lax.fori_loop(visits.first, visits.last, visit, carry)
    lax.fori_loop(visits.last, visits.copied_last, pass_over, None)
    return carry


def visit_every_other(
    visits: Visits, visit: Callable, skip: Callable, first: Array, carry: Any
) -> Any:
    """Visits every other tile that is copied, from the `first`, 0 or 1; passes over the rest."""

    @pl.when((first == 1) & (visits.copied > 0))
    def _():
        skip(visits.copied_first)

    def both(step, carry):
        tile = visits.copied_first + first + 2 * step
        carry = visit(tile, carry)

        @pl.when(tile + 1 < visits.copied_last)
        def _():
            skip(tile + 1)

        return carry

    count = lax.div(jnp.maximum(visits.copied - first + 1, 0), jnp.int32(2))
    return lax.fori_loop(0, count, both, carry)


def for_each_item(items: Any, body: Callable, carry: Any) -> Any:
    """Calls `body(item, step, carry)` for the items of this program: every so many, one is its.

    Programs are as many as there are multiprocessors, and take one item after another, so that
    the copies for the next item are under way while one ends.
    """
    core, cores = lax.axis_index("core"), lax.axis_size("core")
    count = lax.div(items - core + (cores - 1), jnp.int32(cores))

    def step(index, carry):
        return body(core + index * cores, index, carry)

    return lax.fori_loop(0, count, step, carry), count


def split_item(item: Array, *sizes: int | Array) -> tuple[Array, ...]:
    """Coordinates of an item, the last of `sizes` the fastest; the first has no size.

    Items done at one time should share what they read: it then comes from the L2.
    """
    coordinates = []
    for size in reversed(sizes):
        size = jnp.asarray(size, jnp.int32)
        coordinates.append(lax.rem(item, size))
        item = lax.div(item, size)
    return (item, *reversed(coordinates))


def bound_line(ref: Any, batch_index: Array, kv_head: Array) -> tuple[Array, Array]:
    """Where bounds of one or all batch rows and KV heads are."""
    zero = jnp.int32(0)
    return batch_index if ref.shape[0] > 1 else zero, kv_head if ref.shape[1] > 1 else zero


def mask_edge(
    visits: Visits, tile: Array, scores: Array, entry: Callable, bounds: Callable, axis: int
) -> Array:
    """Scores, -inf where the entry lies outside the row's bounds; `axis` is the bounds'.

    Bounds may also be numbers, of all rows.
    """

    def masked(scores):
        start, end = (spread(b, scores, axis) for b in bounds())
        index = entry()
        return jnp.where((index >= start) & (index < end), scores, -jnp.inf)

    edge = (tile < visits.full_first) | (tile >= visits.full_last)
    return lax.cond(edge, masked, lambda scores: scores, scores)


def clear_from(tile: Any, first: Array) -> None:
    """Clears the lines of a tile in shared memory from the given one on: 0 * NaN is NaN."""

    @pl.when(first < tile.shape[0])
    def _():
        kept = indices(tile.shape, 0) < first
        tile[...] = jnp.where(kept, load_tile(tile), jnp.zeros((), tile.dtype))
        plgpu.commit_smem()


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


def load_tile(ref: Any) -> Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)  # pyright: ignore[reportCallIssue]


def load_rows(ref: Any) -> Array:
    return plgpu.load(  # pyright: ignore[reportCallIssue]
        ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
    )


def load_columns(ref: Any) -> Array:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))  # pyright: ignore[reportCallIssue]


def spread(vector: Array, like: Array, axis: int) -> Array:
    return lax.broadcast_in_dim(vector, like.shape, [axis][: vector.ndim])


def indices(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def roles(workers: int, compute: Callable, copy: Callable) -> None:
    worker = lax.axis_index("worker")
    more, fewer = REGISTERS.get(workers, (None, None))

    @pl.when(worker < workers)
    def _():
        if more is not None:
            plgpu.set_max_registers(more, action="increase")
        compute(worker)

    @pl.when(worker == workers)
    def _():
        if fewer is not None:
            plgpu.set_max_registers(fewer, action="decrease")
        copy()


def launch(workers: int, items: int) -> dict[str, Any]:
    """Arguments of `plgpu.kernel` for a program a multiprocessor."""
    return {
        "grid": (min(gpu.multiprocessors(), items),),
        "grid_names": ("core",),
        "num_threads": workers + 1,
        "thread_name": "worker",
        "compiler_params": plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES
        ),
    }


def one_place(*buffers: Any) -> Any:
    """Shared memory that holds one of the buffers at a time."""
    return plgpu.RefUnion(*buffers)  # pyright: ignore[reportPrivateImportUsage]


def shared_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
