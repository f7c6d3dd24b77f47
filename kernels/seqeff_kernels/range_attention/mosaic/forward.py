"""The Mosaic kernel of the forward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from seqeff_kernels.range_attention.mosaic.pieces import (
    LOG2E,
    LOWEST,
    add_product,
    await_all_free,
    bound_line,
    copy_entries,
    filled,
    indices,
    load_rows,
    mask_edge,
    padded_bounds,
    read_visits,
    roles,
    row_visits,
    shared_memory,
    slot_index,
    spread,
    threads,
    times_transposed,
    visit_all,
)
from seqeff_kernels.range_attention.mosaic.tiles import Plan
from seqeff_kernels.range_attention.sources import ListedSource


def forward(
    queries: Sequence[Array], sources: Sequence[ListedSource], plan: Plan
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """Output and logsumexp."""
    tiles, factor = plan.tiles, plan.scale * LOG2E
    batch, rows, heads, head_dim = queries[0].shape
    dtype = queries[0].dtype
    block, workers, stages = tiles.block_rows, tiles.workers, tiles.stages
    bounds = [padded_bounds(s, tiles) for s in sources]
    tables = [
        row_visits(*b, s.keys.shape[1], size, tiles)
        for s, b, size in zip(sources, bounds, plan.entries, strict=True)
    ]
    programs = bounds[0][0].shape[-1] // (block * workers)

    def kernel(query_refs, source_refs, output_ref, logsumexp_ref, scratch):
        query_smem, key_smem, value_smem, logsumexp_smem, barriers = scratch
        query_ready, key_ready, value_ready, key_free, value_free, turn = barriers
        batch_index, head = lax.axis_index("batch"), lax.axis_index("heads")
        kv_head = lax.div(head, jnp.int32(heads // sources[0].keys.shape[2]))
        # later rows attend more
        program = programs - 1 - lax.axis_index("programs")
        worker = lax.axis_index("worker")
        alternate = tiles.take_turns and workers == 2

        def end_turn():
            if alternate:
                plgpu.barrier_arrive(turn)

        def await_turn():
            if alternate:
                plgpu.barrier_wait(turn)

        def compute():
            row_block = program * workers + worker
            own_rows = pl.ds(row_block * block, block)
            for i, ref in enumerate(query_refs):
                plgpu.copy_gmem_to_smem(
                    ref.at[batch_index, own_rows, head],
                    query_smem.at[i, worker],
                    query_ready.at[worker],
                )
            plgpu.barrier_wait(query_ready.at[worker])

            @pl.when(worker == 1)
            def _():
                end_turn()
                await_turn()

            carry = (
                filled((block, head_dim), 0),
                filled((block,), LOWEST),
                filled((block,), 0),
            )
            copied = jnp.int32(0)
            for refs, size, q in zip(source_refs, plan.entries, plan.queries, strict=True):
                _, _, start_ref, end_ref, table_ref = refs
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
                        end_turn()
                        await_turn()

                def visit(
                    tile, carry, visits=visits, size=size, q=q, bounds=(start, end), slot_of=slot_of
                ):
                    weighted, maximum, total = carry
                    slot = slot_of(tile)
                    plgpu.barrier_wait(key_ready.at[slot])

                    def meanwhile():
                        end_turn()
                        await_turn()

                    scores = times_transposed(
                        query_smem.at[q, worker], key_smem.at[slot, pl.ds(0, size)], meanwhile
                    )
                    plgpu.barrier_arrive(key_free.at[slot])
                    scores = mask_edge(
                        visits,
                        tile,
                        scores,
                        lambda: indices(scores.shape, 1),
                        lambda: (b - tile * size for b in bounds),
                        0,
                    )
                    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * factor)
                    correction = jnp.exp2(maximum - new_maximum)
                    weights = jnp.exp2(scores * factor - spread(new_maximum, scores, 0))
                    weighted *= spread(correction, weighted, 0)
                    narrow = weights.astype(dtype)
                    total = total * correction + weights.sum(axis=1)
                    # the other worker multiplies until here; nothing may be moved past it
                    weighted, total, new_maximum, narrow = lax.optimization_barrier(
                        (weighted, total, new_maximum, narrow)
                    )
                    end_turn()
                    plgpu.barrier_wait(value_ready.at[slot])
                    await_turn()
                    weighted = add_product(weighted, narrow, value_smem.at[slot, pl.ds(0, size)])
                    plgpu.barrier_arrive(value_free.at[slot])
                    return weighted, new_maximum, total

                carry = visit_all(visits, visit, skip, carry)
                copied += visits.copied_last - visits.copied_first

            @pl.when(worker == 0)
            def _():
                end_turn()
                await_turn()

            weighted, maximum, total = carry
            empty = total == 0
            inverse = jnp.where(empty, 0.0, 1 / total)
            # all products with the queries are done: the output leaves from their place
            query_smem[0, worker] = (weighted * spread(inverse, weighted, 0)).astype(dtype)
            logsumexp_smem[worker] = jnp.where(empty, -jnp.inf, maximum / LOG2E + jnp.log(total))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                query_smem.at[0, worker], output_ref.at[batch_index, own_rows, head]
            )
            plgpu.copy_smem_to_gmem(
                logsumexp_smem.at[worker], logsumexp_ref.at[batch_index, head, own_rows]
            )
            plgpu.wait_smem_to_gmem(0)

        def copy():
            copied = jnp.int32(0)
            for refs, size in zip(source_refs, plan.entries, strict=True):
                key_ref, value_ref, _, _, table_ref = refs
                visits = read_visits(table_ref, batch_index, kv_head, program * workers)
                streams = ((key_ref, key_smem, key_ready, key_free),
                           (value_ref, value_smem, value_ready, value_free))  # fmt: skip
                copy_entries(streams, visits, copied, size, stages, batch_index, kv_head)
                copied += visits.copied_last - visits.copied_first
            await_all_free((key_free, value_free), copied, stages)

        roles(workers, worker, compute, copy)

    largest = max(plan.entries)
    output, logsumexp = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(queries[0].shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, bounds[0][0].shape[-1]), jnp.float32),
        ],
        scratch_types=[
            (
                shared_memory((len(queries), workers, block, head_dim), dtype),
                shared_memory((stages, largest, head_dim), dtype),
                shared_memory((stages, largest, head_dim), dtype),
                plgpu.SMEM((workers, block), jnp.float32),
                (
                    plgpu.Barrier(num_arrivals=len(queries), num_barriers=workers),
                    plgpu.Barrier(num_barriers=stages),
                    plgpu.Barrier(num_barriers=stages),
                    plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
                    plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
                    plgpu.Barrier(num_arrivals=workers),
                ),
            )
        ],
        grid=(heads, programs, batch),
        grid_names=("heads", "programs", "batch"),
        **threads(workers),
    )(
        list(queries),
        [
            (s.keys, s.values, *b, table)
            for s, b, table in zip(sources, bounds, tables, strict=True)
        ],
    )
    return output, jnp.swapaxes(logsumexp[..., :rows], 1, 2)
