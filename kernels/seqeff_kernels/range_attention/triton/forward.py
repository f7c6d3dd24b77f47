"""The Triton kernel of the forward pass; README.md derives it."""

import triton
import triton.language as tl

from seqeff_kernels.range_attention.triton.pieces import LN2, LOG2E, LOWEST, load_tile, see_source


@triton.jit
def _forward_visit(
    state,
    queries,
    keys,
    values,
    first,
    start,
    end,
    entries,
    factor,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    MASKED: tl.constexpr,
    CLEAN: tl.constexpr,
):
    """Adds one entry tile to the online softmax of a row tile, in base 2."""
    accumulator, maximum, total = state
    key = load_tile(keys, first, entries, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, MASKED)
    scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
    value = load_tile(values, first, entries, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, MASKED)
    if MASKED:
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        attended = (entry[None, :] >= start[:, None]) & (entry[None, :] < end[:, None])
        scores = tl.where(attended, scores, float("-inf"))
        if not CLEAN:
            # an entry that no row attends may be NaN, and 0 * NaN is NaN
            used = tl.max(attended.to(tl.int32), 0) > 0
            value = tl.where(used[:, None], value, 0.0)
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
    weights = tl.math.exp2(scores * factor - new_maximum[:, None])
    correction = tl.math.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, 1)
    accumulator = accumulator * correction[:, None]
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, new_maximum, total


@triton.jit
def forward(
    queries_ptr,
    queries_ptr_0, keys_ptr_0, values_ptr_0, start_ptr_0, end_ptr_0, visits_ptr_0,
    queries_ptr_1, keys_ptr_1, values_ptr_1, start_ptr_1, end_ptr_1, visits_ptr_1,
    queries_ptr_2, keys_ptr_2, values_ptr_2, start_ptr_2, end_ptr_2, visits_ptr_2,
    output_ptr,
    logsumexp_ptr,
    SCALE: tl.constexpr,
    SOURCES: tl.constexpr,
    OWN_QUERIES: tl.constexpr,
    BOUND_BATCHES: tl.constexpr,
    BOUND_HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FULL_TILES: tl.constexpr,
    CLEAN: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
) -> None:  # fmt: skip
    """Output and logsumexp of one tile of rows of one head; grid (heads, row tiles, batch)."""
    head = tl.program_id(0)
    # later rows attend more: the long tiles first
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // (HEADS // KV_HEADS)
    first = tile * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    place = batch.to(tl.int64) * (ROWS * HEADS * HEAD_DIM) + head * HEAD_DIM
    place = place + row[:, None] * (HEADS * HEAD_DIM) + dim[None, :]
    mask = (row[:, None] < ROWS) & (dim[None, :] < HEAD_DIM)
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    factor = SCALE * LOG2E

    source_0 = see_source(
        keys_ptr_0, values_ptr_0, start_ptr_0, end_ptr_0, visits_ptr_0, batch, kv_head,
        tile, row, BOUND_BATCHES[0], BOUND_HEADS[0], ENTRIES[0], ROWS, KV_HEADS, HEAD_DIM,
        BLOCK_ENTRIES, FULL_TILES[0],
    )  # fmt: skip
    source_1 = see_source(
        keys_ptr_1, values_ptr_1, start_ptr_1, end_ptr_1, visits_ptr_1, batch, kv_head,
        tile, row, BOUND_BATCHES[1], BOUND_HEADS[1], ENTRIES[1], ROWS, KV_HEADS, HEAD_DIM,
        BLOCK_ENTRIES, FULL_TILES[1],
    )  # fmt: skip
    source_2 = see_source(
        keys_ptr_2, values_ptr_2, start_ptr_2, end_ptr_2, visits_ptr_2, batch, kv_head,
        tile, row, BOUND_BATCHES[2], BOUND_HEADS[2], ENTRIES[2], ROWS, KV_HEADS, HEAD_DIM,
        BLOCK_ENTRIES, FULL_TILES[2],
    )  # fmt: skip
    sources = (source_0, source_1, source_2)
    own_queries = (queries_ptr_0, queries_ptr_1, queries_ptr_2)

    maximum = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    queries = tl.load(queries_ptr + place, mask=mask, other=0.0)
    for source in tl.static_range(SOURCES):
        if OWN_QUERIES:
            queries = tl.load(own_queries[source] + place, mask=mask, other=0.0)
        keys, values, begin, before, full, after, start, end = sources[source]
        for index in range(0, before + after):
            edge = begin + (index + tl.where(index < before, 0, full)) * BLOCK_ENTRIES
            accumulator, maximum, total = _forward_visit(
                (accumulator, maximum, total), queries, keys, values, edge, start, end,
                ENTRIES[source], factor, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, True,
                CLEAN[source],
            )  # fmt: skip
        if FULL_TILES[source]:
            begin += before * BLOCK_ENTRIES
            for index in range(0, full):
                accumulator, maximum, total = _forward_visit(
                    (accumulator, maximum, total), queries, keys, values,
                    begin + index * BLOCK_ENTRIES, start, end, ENTRIES[source], factor,
                    STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, False, CLEAN[source],
                )  # fmt: skip

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    output = accumulator / divisor[:, None]
    logsumexp = tl.where(empty, float("-inf"), (maximum + tl.math.log2(divisor)) * LN2)
    tl.store(output_ptr + place, output.to(output_ptr.dtype.element_ty), mask=mask)
    line = (batch * HEADS + head).to(tl.int64) * ROWS
    tl.store(logsumexp_ptr + line + row, logsumexp, mask=row < ROWS)
