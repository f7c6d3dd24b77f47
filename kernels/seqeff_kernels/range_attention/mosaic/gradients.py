"""The Mosaic kernels of the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Int

from seqeff_kernels.range_attention.mosaic.pieces import (
    LOG2E,
    Ring,
    add_product,
    bound_line,
    filled,
    for_each_item,
    indices,
    launch,
    load_columns,
    load_rows,
    mask_edge,
    pad_to,
    roles,
    shared_memory,
    split_item,
    spread,
    tile_visits,
    times_transposed,
    visit_all,
)
from seqeff_kernels.range_attention.mosaic.rows import Rows
from seqeff_kernels.range_attention.mosaic.tiles import BLOCK, Plan
from seqeff_kernels.range_attention.sources import ListedSource
from seqeff_kernels.range_attention.visits import row_tile_visits


def row_statistics(
    outputs: tuple[Array, Array], gradients: tuple[Array, Array], plan: Plan
) -> tuple[Array, Array, Array]:
    """The output's gradient; and of each row, padded to whole programs, logsumexp and delta.

    The logsumexp is in powers of two; delta is `output . output gradient - logsumexp gradient`.
    """
    (output, logsumexp), (output_gradient, logsumexp_gradient) = outputs, gradients
    delta = jnp.sum(output.astype(jnp.float32) * output_gradient.astype(jnp.float32), -1)
    empty = jnp.isneginf(logsumexp)
    delta = jnp.where(empty, 0, delta - logsumexp_gradient)
    # an empty row has weights exp(score - inf), which are 0
    offset = jnp.where(empty, jnp.inf, logsumexp * LOG2E)
    delta, offset = (
        pad_to(jnp.swapaxes(x, 1, 2), 2, plan.tiles.rows_of_program, constant_values=fill)
        for x, fill in ((delta, 0), (offset, jnp.inf))
    )
    return output_gradient.astype(output.dtype), offset, delta


def queries_gradient(
    queries: Array, sources: Sequence[ListedSource], statistics: tuple[Array, ...], plan: Plan
) -> Array:
    """Gradient of one of the distinct queries, which `sources` take."""
    tiles, factor = plan.tiles, plan.scale * LOG2E
    _, rows, heads, head_dim = queries.shape
    dtype = queries.dtype
    block, workers, size = tiles.block_rows, tiles.workers, tiles.backward_tile
    stages, buffers = tiles.backward_stages, tiles.backward_buffers
    cut = Rows(rows, heads, sources, [size] * len(sources), tiles)

    def kernel(query_ref, statistics_refs, source_refs, gradient_ref, scratch):
        rows_scratch, key_scratch, value_scratch = scratch
        own_ring = Ring(buffers, *rows_scratch)
        key_ring, value_ring = Ring(stages, *key_scratch), Ring(stages, *value_scratch)
        query_smem, output_smem, offset_smem, delta_smem, bounds_smem = own_ring.buffers
        output_ref, offset_ref, delta_ref = statistics_refs

        def compute(worker):
            def one_item(item, step, copied):
                place = cut.locate(item)
                own = own_ring.slot(step)
                bounds = cut.bounds(source_refs, bounds_smem, own, place)
                own_ring.take(own)
                mine = pl.ds(worker * block, block)
                offset, delta = (load_rows(x.at[own, mine]) for x in (offset_smem, delta_smem))
                gradient = filled((block, head_dim), 0)
                for index, visits in enumerate(bounds.visits(worker)):
                    rows_bounds = bounds.of(index, worker)

                    def slot_of(tile, copied=copied, visits=visits):
                        return key_ring.slot(copied + tile - visits.copied_first)

                    def skip(tile, slot_of=slot_of):
                        slot = slot_of(tile)
                        key_ring.skip(slot)
                        value_ring.skip(slot)

                    def visit(
                        tile, gradient, visits=visits, rows_bounds=rows_bounds, slot_of=slot_of
                    ):
                        slot = slot_of(tile)
                        key_ring.take(slot)
                        scores = times_transposed(
                            query_smem.at[own, worker], key_ring.buffers.at[slot]
                        )
                        value_ring.take(slot)
                        weights_gradient = times_transposed(
                            output_smem.at[own, worker], value_ring.buffers.at[slot]
                        )
                        value_ring.give(slot)
                        scores = mask_edge(
                            visits,
                            tile,
                            scores,
                            lambda: indices(scores.shape, 1),
                            lambda: (b - tile * size for b in rows_bounds),
                            0,
                        )
                        weights = jnp.exp2(scores * factor - spread(offset, scores, 0))
                        scores_gradient = weights * (weights_gradient - spread(delta, scores, 0))
                        gradient = add_product(
                            gradient, scores_gradient.astype(dtype), key_ring.buffers.at[slot]
                        )
                        key_ring.give(slot)
                        return gradient

                    gradient = visit_all(visits, visit, skip, gradient)
                    copied += visits.copied
                query_smem[own, worker] = (gradient * plan.scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    query_smem.at[own, worker],
                    gradient_ref.at[place.batch_index, cut.rows_of(place, worker), place.head],
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                own_ring.give(own)
                return copied

            for_each_item(cut.items, one_item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        def own_copies(place, own):
            for worker in range(workers):
                rows = cut.rows_of(place, worker)
                for ref, smem in ((query_ref, query_smem), (output_ref, output_smem)):
                    yield ref.at[place.batch_index, rows, place.head], smem.at[own, worker]
            rows = cut.all_rows_of(place)
            for ref, smem in ((offset_ref, offset_smem), (delta_ref, delta_smem)):
                yield ref.at[place.batch_index, place.head, rows], smem.at[own]

        def copy():
            cut.copy_all(source_refs, own_ring, own_copies, (key_ring, value_ring))

        roles(workers, compute, copy)

    ring = functools.partial(Ring.scratch, workers=workers)
    vector = plgpu.SMEM((buffers, tiles.rows_of_program), jnp.float32)
    own_tile = shared_memory((buffers, workers, block, head_dim), dtype)
    entry_tile = shared_memory((stages, size, head_dim), dtype)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(queries.shape, dtype),
        scratch_types=[
            (
                ring(
                    buffers,
                    (own_tile, own_tile, vector, vector, cut.bounds_memory(buffers)),
                    copies=2 * workers + 2 + 2 * len(sources),
                ),
                ring(stages, entry_tile, copies=1),
                ring(stages, entry_tile, copies=1),
            )
        ],
        **launch(workers, cut.items),
    )(queries, statistics, cut.operands())


def entry_visits(
    start: Array, end: Array, entries: int, size: int, workers: int
) -> Int[Array, "batch_or_1 kv_heads_or_1 numbers"]:
    """The row tiles that attend each block of entries: first, full first, full last, last."""
    blocks = pl.cdiv(entries, BLOCK * workers) * workers
    low = jnp.arange(blocks) * BLOCK
    high = jnp.minimum(low + BLOCK, entries)
    return row_tile_visits(start, end, low, high, size).reshape(*start.shape[:2], -1)


def entries_gradient(
    queries: Array,
    source: ListedSource,
    statistics: tuple[Array, ...],
    plan: Plan,
    last: Int[Array, ""] | None,
) -> tuple[Array, Array]:
    """Gradients of a source's entries.

    Args:
      last: after which no entry's gradient is read: those may be left unwritten. None: all are.
    """
    tiles, factor = plan.tiles, plan.scale * LOG2E
    batch, entries, kv_heads, head_dim = source.keys.shape
    group = queries.shape[2] // kv_heads
    dtype = queries.dtype
    size, workers = tiles.backward_tile, tiles.workers
    stages, buffers = tiles.backward_stages, tiles.backward_buffers
    start, end = (pad_to(b, 2, size, mode="edge") for b in (source.start, source.end))
    table = entry_visits(start, end, entries, size, workers)
    programs = pl.cdiv(entries, BLOCK * workers)
    most = programs * batch * kv_heads
    last = jnp.reshape(jnp.asarray(entries if last is None else last, jnp.int32), 1)

    def kernel(query_ref, statistics_refs, bounds_refs, key_ref, value_ref, table_ref, last_ref,
               key_gradient_ref, value_gradient_ref, scratch):  # fmt: skip
        output_ref, offset_ref, delta_ref = statistics_refs
        entries_scratch, query_scratch, output_scratch = scratch
        own_ring = Ring(buffers, *entries_scratch)
        query_ring, output_ring = Ring(stages, *query_scratch), Ring(stages, *output_scratch)
        key_smem, value_smem, table_smem = own_ring.buffers
        query_smem, offset_smem, *bounds_smem = query_ring.buffers
        output_smem, delta_smem = output_ring.buffers
        per_program = BLOCK * workers
        written = jnp.maximum(lax.div(last_ref[0] + (per_program - 1), jnp.int32(per_program)), 1)
        items = written * (batch * kv_heads)

        def locate(item):
            # earlier entries are attended by more rows
            batch_index, program, kv_head = split_item(item, written, kv_heads)
            return program, batch_index, kv_head

        def span(numbers):
            first, last = numbers
            return first, jnp.maximum(first, last)

        def compute(worker):
            def one_item(item, step, copied):
                program, batch_index, kv_head = locate(item)
                own = own_ring.slot(step)
                own_ring.take(own)
                own_table = table_smem.at[own]
                first, full_first, full_last, last = (own_table[worker * 4 + i] for i in range(4))
                copied_tiles = span((own_table[0], own_table[workers * 4 - 1]))
                visits = tile_visits(first, full_first, full_last, last, copied_tiles)
                entry_block = program * workers + worker

                def one_head(index, carry):
                    before = copied + index * visits.copied

                    def slot_of(tile):
                        return query_ring.slot(before + tile - visits.copied_first)

                    def skip(tile):
                        slot = slot_of(tile)
                        query_ring.skip(slot)
                        output_ring.skip(slot)

                    def visit(tile, carry):
                        key_gradient, value_gradient = carry
                        slot = slot_of(tile)
                        query_ring.take(slot)
                        scores = times_transposed(key_smem.at[own, worker], query_smem.at[slot])
                        offset = load_columns(offset_smem.at[slot])
                        scores = mask_edge(
                            visits,
                            tile,
                            scores,
                            lambda: indices(scores.shape, 0) + entry_block * BLOCK,
                            lambda: (load_columns(ref.at[slot]) for ref in bounds_smem),
                            1,
                        )
                        weights = jnp.exp2(scores * factor - spread(offset, scores, 1))
                        output_ring.take(slot)
                        weights_gradient = times_transposed(
                            value_smem.at[own, worker], output_smem.at[slot]
                        )
                        delta = load_columns(delta_smem.at[slot])
                        scores_gradient = weights * (weights_gradient - spread(delta, scores, 1))
                        value_gradient = add_product(
                            value_gradient, weights.astype(dtype), output_smem.at[slot]
                        )
                        output_ring.give(slot)
                        key_gradient = add_product(
                            key_gradient, scores_gradient.astype(dtype), query_smem.at[slot]
                        )
                        query_ring.give(slot)
                        return key_gradient, value_gradient

                    return visit_all(visits, visit, skip, carry)

                zeros = filled((BLOCK, head_dim), 0)
                key_gradient, value_gradient = lax.fori_loop(0, group, one_head, (zeros, zeros))
                key_smem[own, worker] = (key_gradient * plan.scale).astype(dtype)
                value_smem[own, worker] = value_gradient.astype(dtype)
                plgpu.commit_smem()
                own_entries = pl.ds(entry_block * BLOCK, BLOCK)
                for smem, ref in ((key_smem, key_gradient_ref), (value_smem, value_gradient_ref)):
                    plgpu.copy_smem_to_gmem(
                        smem.at[own, worker], ref.at[batch_index, own_entries, kv_head]
                    )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                own_ring.give(own)
                return copied + group * visits.copied

            for_each_item(items, one_item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def read(item):
                program, batch_index, kv_head = locate(jnp.minimum(item, items - 1))
                line = bound_line(table_ref, batch_index, kv_head)
                numbers = program * (workers * 4)
                return table_ref[(*line, numbers)], table_ref[(*line, numbers + workers * 4 - 1)]

            def one_item(item, step, carry):
                copied, numbers = carry
                upcoming = read(item + lax.axis_size("core"))
                program, batch_index, kv_head = locate(item)
                first, last = span(numbers)

                def own_copies(own):
                    for worker in range(workers):
                        own_entries = pl.ds((program * workers + worker) * BLOCK, BLOCK)
                        for ref, smem in ((key_ref, key_smem), (value_ref, value_smem)):
                            yield ref.at[batch_index, own_entries, kv_head], smem.at[own, worker]
                    line = bound_line(table_ref, batch_index, kv_head)
                    numbers = pl.ds(program * (workers * 4), workers * 4)
                    target = table_smem.at[own, pl.ds(0, workers * 4)]
                    yield table_ref.at[(*line, numbers)], target

                def one_head(index, _):
                    head = kv_head * group + index

                    @pl.loop(first, last)
                    def _(tile):
                        rows = pl.ds(tile * size, size)

                        def query_copies(slot):
                            yield query_ref.at[batch_index, rows, head], query_smem.at[slot]
                            yield offset_ref.at[batch_index, head, rows], offset_smem.at[slot]
                            for ref, smem in zip(bounds_refs, bounds_smem, strict=True):
                                line = bound_line(ref, batch_index, kv_head)
                                yield ref.at[(*line, rows)], smem.at[slot]

                        def output_copies(slot):
                            yield output_ref.at[batch_index, rows, head], output_smem.at[slot]
                            yield delta_ref.at[batch_index, head, rows], delta_smem.at[slot]

                        now = copied + index * (last - first) + tile - first
                        query_ring.fill(now, query_copies)
                        output_ring.fill(now, output_copies)

                own_ring.fill(step, own_copies)
                lax.fori_loop(0, group, one_head, None)
                return copied + group * (last - first), upcoming

            (copied, _), count = for_each_item(
                items, one_item, (jnp.int32(0), read(lax.axis_index("core")))
            )
            for ring, steps in ((query_ring, copied), (output_ring, copied), (own_ring, count)):
                ring.drain(steps)

        roles(workers, compute, copy)

    ring = functools.partial(Ring.scratch, workers=workers)
    own_tile = shared_memory((buffers, workers, BLOCK, head_dim), dtype)
    row_tile = shared_memory((stages, size, head_dim), dtype)
    vector, bound = (plgpu.SMEM((stages, size), kind) for kind in (jnp.float32, jnp.int32))
    # a copy arrives at a multiple of 128 bytes
    numbers = plgpu.SMEM((buffers, 32), jnp.int32)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(source.keys.shape, dtype)] * 2,
        scratch_types=[
            (
                ring(buffers, (own_tile, own_tile, numbers), copies=2 * workers + 1),
                ring(stages, (row_tile, vector, bound, bound), copies=4),
                ring(stages, (row_tile, vector), copies=2),
            )
        ],
        **launch(workers, most),
    )(queries, statistics, (start, end), source.keys, source.values, table, last)
