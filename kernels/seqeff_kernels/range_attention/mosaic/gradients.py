"""The Mosaic kernels of the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqeff_kernels.range_attention.mosaic.pieces import (
    LOG2E,
    add_product,
    await_all_free,
    await_free,
    bound_line,
    copy_entries,
    entry_visits,
    filled,
    indices,
    load_columns,
    load_rows,
    mask_edge,
    pad_to,
    padded_bounds,
    read_visits,
    roles,
    row_visits,
    rows_of_program,
    shared_memory,
    slot_index,
    spread,
    threads,
    times_transposed,
    visit_all,
)
from seqeff_kernels.range_attention.mosaic.tiles import BLOCK, Plan
from seqeff_kernels.range_attention.sources import ListedSource


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
        pad_to(jnp.swapaxes(x, 1, 2), 2, rows_of_program(plan.tiles), constant_values=fill)
        for x, fill in ((delta, 0), (offset, jnp.inf))
    )
    return output_gradient.astype(output.dtype), offset, delta


def queries_gradient(
    queries: Array, sources: Sequence[ListedSource], statistics: tuple[Array, ...], plan: Plan
) -> Array:
    """Gradient of one of the distinct queries, which `sources` take."""
    tiles, factor = plan.tiles, plan.scale * LOG2E
    batch, _, heads, head_dim = queries.shape
    dtype = queries.dtype
    block, workers, size = tiles.block_rows, tiles.workers, tiles.backward_tile
    stages = tiles.backward_stages
    bounds = [padded_bounds(s, tiles) for s in sources]
    tables = [
        row_visits(*b, s.keys.shape[1], size, tiles) for s, b in zip(sources, bounds, strict=True)
    ]
    programs = bounds[0][0].shape[-1] // (block * workers)

    def kernel(query_ref, statistics_refs, source_refs, gradient_ref, scratch):
        query_smem, output_smem, key_smem, value_smem, barriers = scratch
        rows_ready, key_ready, value_ready, key_free, value_free = barriers
        output_ref, offset_ref, delta_ref = statistics_refs
        batch_index, head = lax.axis_index("batch"), lax.axis_index("heads")
        kv_head = lax.div(head, jnp.int32(heads // sources[0].keys.shape[2]))
        program = programs - 1 - lax.axis_index("programs")
        worker = lax.axis_index("worker")

        def compute():
            row_block = program * workers + worker
            own_rows = pl.ds(row_block * block, block)
            for ref, smem in ((query_ref, query_smem), (output_ref, output_smem)):
                plgpu.copy_gmem_to_smem(
                    ref.at[batch_index, own_rows, head], smem.at[worker], rows_ready.at[worker]
                )
            offset, delta = (
                load_rows(ref.at[batch_index, head, own_rows]) for ref in (offset_ref, delta_ref)
            )
            plgpu.barrier_wait(rows_ready.at[worker])
            gradient = filled((block, head_dim), 0)
            copied = jnp.int32(0)
            for _, _, start_ref, end_ref, table_ref in source_refs:
                visits = read_visits(table_ref, batch_index, kv_head, row_block)
                start, end = (
                    load_rows(ref.at[(*bound_line(ref, batch_index, kv_head), own_rows)])
                    for ref in (start_ref, end_ref)
                )
                slot_of = functools.partial(slot_index, copied - visits.copied_first, stages)

                def skip(tile, slot_of=slot_of):
                    slot = slot_of(tile)
                    for ready, free in ((key_ready, key_free), (value_ready, value_free)):
                        plgpu.barrier_wait(ready.at[slot])
                        plgpu.barrier_arrive(free.at[slot])

                def visit(tile, gradient, visits=visits, bounds=(start, end), slot_of=slot_of):
                    slot = slot_of(tile)
                    plgpu.barrier_wait(key_ready.at[slot])
                    scores = times_transposed(query_smem.at[worker], key_smem.at[slot])
                    plgpu.barrier_wait(value_ready.at[slot])
                    weights_gradient = times_transposed(output_smem.at[worker], value_smem.at[slot])
                    plgpu.barrier_arrive(value_free.at[slot])
                    scores = mask_edge(
                        visits,
                        tile,
                        scores,
                        lambda: indices(scores.shape, 1),
                        lambda: (b - tile * size for b in bounds),
                        0,
                    )
                    weights = jnp.exp2(scores * factor - spread(offset, scores, 0))
                    scores_gradient = weights * (weights_gradient - spread(delta, scores, 0))
                    gradient = add_product(
                        gradient, scores_gradient.astype(dtype), key_smem.at[slot]
                    )
                    plgpu.barrier_arrive(key_free.at[slot])
                    return gradient

                gradient = visit_all(visits, visit, skip, gradient)
                copied += visits.copied_last - visits.copied_first
            query_smem[worker] = (gradient * plan.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                query_smem.at[worker], gradient_ref.at[batch_index, own_rows, head]
            )
            plgpu.wait_smem_to_gmem(0)

        def copy():
            copied = jnp.int32(0)
            for key_ref, value_ref, _, _, table_ref in source_refs:
                visits = read_visits(table_ref, batch_index, kv_head, program * workers)
                streams = ((key_ref, key_smem, key_ready, key_free),
                           (value_ref, value_smem, value_ready, value_free))  # fmt: skip
                copy_entries(streams, visits, copied, size, stages, batch_index, kv_head)
                copied += visits.copied_last - visits.copied_first
            await_all_free((key_free, value_free), copied, stages)

        roles(workers, worker, compute, copy)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(queries.shape, dtype),
        scratch_types=[
            (
                shared_memory((workers, block, head_dim), dtype),
                shared_memory((workers, block, head_dim), dtype),
                shared_memory((stages, size, head_dim), dtype),
                shared_memory((stages, size, head_dim), dtype),
                (
                    plgpu.Barrier(num_arrivals=2, num_barriers=workers),
                    plgpu.Barrier(num_barriers=stages),
                    plgpu.Barrier(num_barriers=stages),
                    plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
                    plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
                ),
            )
        ],
        grid=(heads, programs, batch),
        grid_names=("heads", "programs", "batch"),
        **threads(workers),
    )(
        queries,
        statistics,
        [
            (s.keys, s.values, *b, table)
            for s, b, table in zip(sources, bounds, tables, strict=True)
        ],
    )


def entries_gradient(
    queries: Array,
    source: ListedSource,
    statistics: tuple[Array, ...],
    plan: Plan,
    *,
    unvisited: bool,
) -> tuple[Array, Array]:
    """Gradients of a source's entries; without `unvisited`, those no row visits are unwritten."""
    tiles, factor = plan.tiles, plan.scale * LOG2E
    batch, entries, kv_heads, head_dim = source.keys.shape
    group = queries.shape[2] // kv_heads
    dtype = queries.dtype
    size, workers, stages = tiles.backward_tile, tiles.workers, tiles.backward_stages
    start, end = padded_bounds(source, tiles)
    table = entry_visits(start, end, entries, size, workers)
    programs = table.shape[2] // workers

    def kernel(query_ref, statistics_refs, bounds_refs, key_ref, value_ref, table_ref,
               key_gradient_ref, value_gradient_ref, scratch):  # fmt: skip
        output_ref, offset_ref, delta_ref = statistics_refs
        entry_smem, rows_smem, vectors_smem, bounds_smem, barriers = scratch
        key_smem, value_smem = entry_smem
        query_smem, output_smem = rows_smem
        offset_smem, delta_smem = vectors_smem
        entries_ready, query_ready, output_ready, query_free, output_free = barriers
        batch_index, kv_head = lax.axis_index("batch"), lax.axis_index("heads")
        # earlier entries are attended by more rows
        program, worker = lax.axis_index("programs"), lax.axis_index("worker")

        def compute():
            entry_block = program * workers + worker
            own_entries = pl.ds(entry_block * BLOCK, BLOCK)
            for ref, smem in ((key_ref, key_smem), (value_ref, value_smem)):
                plgpu.copy_gmem_to_smem(
                    ref.at[batch_index, own_entries, kv_head],
                    smem.at[worker],
                    entries_ready.at[worker],
                )
            plgpu.barrier_wait(entries_ready.at[worker])
            visits = read_visits(table_ref, batch_index, kv_head, entry_block)

            def one_head(index, carry):
                copied = index * (visits.copied_last - visits.copied_first)
                slot_of = functools.partial(slot_index, copied - visits.copied_first, stages)

                def skip(tile):
                    slot = slot_of(tile)
                    for ready, free in ((query_ready, query_free), (output_ready, output_free)):
                        plgpu.barrier_wait(ready.at[slot])
                        plgpu.barrier_arrive(free.at[slot])

                def visit(tile, carry):
                    key_gradient, value_gradient = carry
                    slot = slot_of(tile)
                    plgpu.barrier_wait(query_ready.at[slot])
                    scores = times_transposed(key_smem.at[worker], query_smem.at[slot])
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
                    plgpu.barrier_wait(output_ready.at[slot])
                    weights_gradient = times_transposed(value_smem.at[worker], output_smem.at[slot])
                    delta = load_columns(delta_smem.at[slot])
                    scores_gradient = weights * (weights_gradient - spread(delta, scores, 1))
                    value_gradient = add_product(
                        value_gradient, weights.astype(dtype), output_smem.at[slot]
                    )
                    plgpu.barrier_arrive(output_free.at[slot])
                    key_gradient = add_product(
                        key_gradient, scores_gradient.astype(dtype), query_smem.at[slot]
                    )
                    plgpu.barrier_arrive(query_free.at[slot])
                    return key_gradient, value_gradient

                return visit_all(visits, visit, skip, carry)

            zeros = filled((BLOCK, head_dim), 0)
            key_gradient, value_gradient = lax.fori_loop(0, group, one_head, (zeros, zeros))
            key_smem[worker] = (key_gradient * plan.scale).astype(dtype)
            value_smem[worker] = value_gradient.astype(dtype)
            plgpu.commit_smem()
            for smem, ref in ((key_smem, key_gradient_ref), (value_smem, value_gradient_ref)):
                plgpu.copy_smem_to_gmem(smem.at[worker], ref.at[batch_index, own_entries, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            visits = read_visits(table_ref, batch_index, kv_head, program * workers)
            count = visits.copied_last - visits.copied_first

            def one_head(index, _):
                head = kv_head * group + index

                @pl.loop(visits.copied_first, visits.copied_last)
                def _(tile):
                    step = index * count + tile - visits.copied_first
                    slot = lax.rem(step, jnp.int32(stages))
                    rows = pl.ds(tile * size, size)
                    await_free(query_free, step, slot, stages)
                    copies = [
                        (query_ref.at[batch_index, rows, head], query_smem),
                        (offset_ref.at[batch_index, head, rows], offset_smem),
                    ]
                    for ref, smem in zip(bounds_refs, bounds_smem, strict=True):
                        copies.append(
                            (ref.at[(*bound_line(ref, batch_index, kv_head), rows)], smem)
                        )
                    for ref, smem in copies:
                        plgpu.copy_gmem_to_smem(ref, smem.at[slot], query_ready.at[slot])
                    await_free(output_free, step, slot, stages)
                    for ref, smem in (
                        (output_ref.at[batch_index, rows, head], output_smem),
                        (delta_ref.at[batch_index, head, rows], delta_smem),
                    ):
                        plgpu.copy_gmem_to_smem(ref, smem.at[slot], output_ready.at[slot])

            lax.fori_loop(0, group, one_head, None)
            await_all_free((query_free, output_free), group * count, stages)

        def where_needed(role):
            def only_if_visited():
                visits = read_visits(table_ref, batch_index, kv_head, program * workers)
                pl.when(visits.copied_first < visits.copied_last)(role)

            return role if unvisited else only_if_visited

        roles(workers, worker, where_needed(compute), where_needed(copy))

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(source.keys.shape, dtype)] * 2,
        scratch_types=[
            (
                [shared_memory((workers, BLOCK, head_dim), dtype)] * 2,
                [shared_memory((stages, size, head_dim), dtype)] * 2,
                [plgpu.SMEM((stages, size), jnp.float32)] * 2,
                [plgpu.SMEM((stages, size), jnp.int32)] * 2,
                (
                    plgpu.Barrier(num_arrivals=2, num_barriers=workers),
                    plgpu.Barrier(num_arrivals=4, num_barriers=stages),
                    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                    plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
                    plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
                ),
            )
        ],
        grid=(kv_heads, programs, batch),
        grid_names=("heads", "programs", "batch"),
        **threads(workers),
    )(queries, statistics, (start, end), source.keys, source.values, table)
