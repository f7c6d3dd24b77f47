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
    Ring,
    add_product,
    clear_from,
    filled,
    for_each_item,
    indices,
    launch,
    load_rows,
    load_tile,
    mask_edge,
    one_place,
    roles,
    shared_memory,
    spread,
    times_transposed,
    visit_all,
    visit_every_other,
)
from seqeff_kernels.range_attention.mosaic.rows import FilledSource, Rows
from seqeff_kernels.range_attention.mosaic.tiles import Plan
from seqeff_kernels.range_attention.sources import ListedSource


def forward(
    queries: Sequence[Array],
    sources: Sequence[ListedSource | FilledSource],
    plan: Plan,
    *,
    splits: int = 1,
    clear_values: bool = False,
) -> tuple[
    Float[Array, "batch_splits rows heads head_dim"], Float[Array, "batch_splits heads rows"]
]:
    """Output and logsumexp, whose rows are filled up to whole programs.

    Args:
      splits: parts of the entries, of which each gives an output, in float32 and with its rows
        filled up too, and a logsumexp.
      clear_values: values past the last row's end may be NaN; else no entry may be.
    """
    tiles, factor = plan.tiles, plan.scale * LOG2E
    batch, rows, heads, head_dim = queries[0].shape
    dtype = queries[0].dtype
    block, workers, stages = tiles.block_rows, tiles.workers, tiles.stages
    cut = Rows(rows, heads, sources, plan.entries, tiles, splits)
    largest = max(plan.entries)
    handed_columns = tiles.handed_columns(head_dim)

    def kernel(query_refs, source_refs, output_ref, logsumexp_ref, scratch):
        rows_scratch, key_scratch, value_scratch, turn, asked, given = scratch
        own_ring = Ring(tiles.buffers, *rows_scratch)
        key_ring, value_ring = Ring(stages, *key_scratch), Ring(stages, *value_scratch)
        (query_smem, *handed_smem), bounds_smem = own_ring.buffers
        alternate = tiles.take_turns and workers == 2

        def end_turn():
            if alternate:
                plgpu.barrier_arrive(turn)

        def await_turn():
            if alternate:
                plgpu.barrier_wait(turn)

        def compute(worker):
            block_index = jnp.int32(0) if tiles.share_rows else worker

            @pl.when(worker == 1)
            def _():
                end_turn()
                await_turn()

            def one_item(item, step, copied):
                place = cut.locate(item)
                own = own_ring.slot(step)
                bounds = cut.bounds(source_refs, bounds_smem, own, place)
                own_ring.take(own)
                carry = (
                    filled((block, head_dim), 0),
                    filled((block,), LOWEST),
                    filled((block,), 0),
                )
                all_visits = bounds.visits(block_index)
                if alternate:
                    # an item without tiles takes the turns of one: else worker 1, half a tile
                    # behind, never ends the item before, for whose room the next one's rows wait
                    @pl.when(sum(visits.copied for visits in all_visits) == 0)
                    def _():
                        for _ in range(2):
                            end_turn()
                            await_turn()

                for index, (visits, size, q) in enumerate(
                    zip(all_visits, plan.entries, plan.queries, strict=True)
                ):
                    rows_bounds = bounds.of(index, block_index)

                    def slot_of(tile, copied=copied, visits=visits):
                        return key_ring.slot(copied + tile - visits.copied_first)

                    def skip(tile, slot_of=slot_of):
                        slot = slot_of(tile)
                        for ring in (key_ring, value_ring):
                            ring.skip(slot)
                            end_turn()
                            await_turn()

                    def visit(tile, carry, index=index, visits=visits, size=size, q=q,
                              rows_bounds=rows_bounds, slot_of=slot_of):  # fmt: skip
                        weighted, maximum, total = carry
                        slot = slot_of(tile)
                        key_ring.take(slot)

                        def meanwhile():
                            end_turn()
                            await_turn()

                        scores = times_transposed(
                            query_smem.at[own, q, block_index],
                            key_ring.buffers.at[slot, pl.ds(0, size)],
                            meanwhile,
                        )
                        key_ring.give(slot)
                        scores = mask_edge(
                            visits,
                            tile,
                            scores,
                            lambda: indices(scores.shape, 1),
                            lambda: (b - tile * size for b in rows_bounds),
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
                        value_ring.take(slot)
                        values = value_ring.buffers.at[slot, pl.ds(0, size)]
                        if clear_values:
                            clear_from(values, bounds.end(index) - tile * size)
                        await_turn()
                        weighted = add_product(weighted, narrow, values)
                        value_ring.give(slot)
                        return weighted, new_maximum, total

                    if tiles.share_rows:
                        first = lax.rem(copied + worker, jnp.int32(2))
                        carry = visit_every_other(visits, visit, skip, first, carry)
                    else:
                        carry = visit_all(visits, visit, skip, carry)
                    copied += visits.copied

                weighted, maximum, total = carry
                if tiles.share_rows:
                    parts = [
                        weighted[:, column : column + handed_columns]
                        for column in range(0, head_dim, handed_columns)
                    ]

                    @pl.when(worker == 1)
                    def _():
                        hand_over(own, parts, maximum, total)

                    @pl.when(worker == 0)
                    def _():
                        write(place, own, *merged(own, parts, maximum, total))

                else:
                    write(place, own, [weighted], maximum, total)
                own_ring.give(own)
                return copied

            def write(place, own, parts, maximum, total):
                empty = total == 0
                inverse = jnp.where(empty, 0.0, 1 / total)
                line = place.batch_index * splits + place.split
                own_rows, head = cut.rows_of(place, block_index), place.head
                logsumexp_ref[line, head, own_rows] = jnp.where(
                    empty, -jnp.inf, maximum / LOG2E + jnp.log(total)
                )
                for index, part in enumerate(parts):
                    part *= spread(inverse, part, 0)
                    columns = pl.ds(index * part.shape[1], part.shape[1])
                    if splits == 1:
                        # all products with the queries are done: the output leaves from their place
                        query_smem[own, 0, block_index, :, columns] = part.astype(dtype)
                    else:
                        output_ref[line, own_rows, head, columns] = part
                plgpu.commit_smem()
                if splits == 1:
                    plgpu.copy_smem_to_gmem(
                        query_smem.at[own, 0, block_index], output_ref.at[line, own_rows, head]
                    )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def hand_over(own, parts, maximum, total):
                """Gives the other worker what this one found, part after part, as it asks."""
                for which, numbers in enumerate((maximum, total)):
                    bounds_smem[own, len(cut.listed), which] = lax.bitcast_convert_type(
                        numbers, jnp.int32
                    )
                for part in parts:
                    plgpu.barrier_wait(asked)
                    handed_smem[0][...] = part
                    plgpu.barrier_arrive(given)

            def merged(own, parts, maximum, total):
                """With what the other worker hands over."""

                def handed():
                    # into the place of the queries, which this worker needs no more
                    plgpu.barrier_arrive(asked)
                    plgpu.barrier_wait(given)
                    return load_tile(handed_smem[0])

                other_first = handed()
                other_maximum, other_total = (
                    lax.bitcast_convert_type(
                        load_rows(bounds_smem.at[own, len(cut.listed), which]), jnp.float32
                    )
                    for which in range(2)
                )
                highest = jnp.maximum(maximum, other_maximum)
                share, other_share = (jnp.exp2(m - highest) for m in (maximum, other_maximum))

                def summed(part, other):
                    return part * spread(share, part, 0) + other * spread(other_share, part, 0)

                first, *rest = parts
                sums = [summed(first, other_first), *(summed(part, handed()) for part in rest)]
                return sums, highest, total * share + other_total * other_share

            for_each_item(cut.items, one_item, jnp.int32(0))

            @pl.when(worker == 0)
            def _():
                end_turn()
                await_turn()

            plgpu.wait_smem_to_gmem(0)

        def own_copies(place, own):
            for index in range(tiles.blocks_of_program):
                rows = cut.rows_of(place, index)
                for q, ref in enumerate(query_refs):
                    yield ref.at[place.batch_index, rows, place.head], query_smem.at[own, q, index]

        def copy():
            cut.copy_all(source_refs, own_ring, own_copies, (key_ring, value_ring))

        roles(workers, compute, copy)

    # only the copy engine stops at the last row
    output_rows, output_dtype = (rows, dtype) if splits == 1 else (cut.padded, jnp.float32)
    own_blocks = (tiles.buffers, len(queries), tiles.blocks_of_program, block, head_dim)
    places = (shared_memory(own_blocks, dtype),)
    if tiles.share_rows:
        places = one_place(*places, shared_memory((block, handed_columns), jnp.float32))
    tile_ring = functools.partial(Ring.scratch, copies=1, workers=workers)
    tile = shared_memory((stages, largest, head_dim), dtype)
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((batch * splits, output_rows, heads, head_dim), output_dtype),
            jax.ShapeDtypeStruct((batch * splits, heads, cut.padded), jnp.float32),
        ],
        scratch_types=[
            (
                Ring.scratch(
                    tiles.buffers,
                    (places, cut.bounds_memory(tiles.buffers)),
                    copies=len(queries) * tiles.blocks_of_program + 2 * len(cut.listed),
                    workers=workers,
                ),
                tile_ring(stages, tile),
                tile_ring(stages, tile),
                plgpu.Barrier(num_arrivals=workers),
                plgpu.Barrier(),
                plgpu.Barrier(),
            )
        ],
        **launch(workers, cut.items),
    )(list(queries), cut.operands())
