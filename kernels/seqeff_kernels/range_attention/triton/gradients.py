"""The Triton kernels of the backward pass; README.md derives them."""

import triton
import triton.language as tl

from seqeff_kernels.range_attention.triton.pieces import (
    LOG2E,
    NOWHERE,
    load_tile,
    read_visits,
    see_source,
)


@triton.jit
def _queries_gradient_visit(
    gradient,
    queries,
    statistics,
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
    """Adds one entry tile to the gradient of a row tile's queries, without the scale."""
    output_gradient, logsumexp, delta = statistics
    key = load_tile(keys, first, entries, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, MASKED)
    value = load_tile(values, first, entries, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, MASKED)
    scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
    weights_gradient = tl.dot(output_gradient, tl.trans(value), input_precision="ieee")
    weights = tl.math.exp2(scores * factor - logsumexp[:, None])
    scores_gradient = weights * (weights_gradient - delta[:, None])
    if MASKED:
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        attended = (entry[None, :] >= start[:, None]) & (entry[None, :] < end[:, None])
        scores_gradient = tl.where(attended, scores_gradient, 0.0)
        if not CLEAN:
            used = tl.max(attended.to(tl.int32), 0) > 0
            key = tl.where(used[:, None], key, 0.0)
    return tl.dot(scores_gradient.to(key.dtype), key, gradient, input_precision="ieee")


@triton.jit
def queries_gradient(
    queries_ptr,
    queries_ptr_0, keys_ptr_0, values_ptr_0, start_ptr_0, end_ptr_0, visits_ptr_0,
    queries_ptr_1, keys_ptr_1, values_ptr_1, start_ptr_1, end_ptr_1, visits_ptr_1,
    queries_ptr_2, keys_ptr_2, values_ptr_2, start_ptr_2, end_ptr_2, visits_ptr_2,
    output_ptr,
    logsumexp_ptr,
    output_gradient_ptr,
    logsumexp_gradient_ptr,
    gradient_ptr_0,
    gradient_ptr_1,
    gradient_ptr_2,
    delta_ptr,
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
    """Gradients of the queries of one tile of rows of one head; grid (heads, row tiles, batch).

    With OWN_QUERIES one gradient a source, else the first holds that of the shared queries. Also
    `delta = output . output gradient - logsumexp gradient`, for `entries_gradient`.
    """
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // (HEADS // KV_HEADS)
    first = tile * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    place = batch.to(tl.int64) * (ROWS * HEADS * HEAD_DIM) + head * HEAD_DIM
    place = place + row[:, None] * (HEADS * HEAD_DIM) + dim[None, :]
    mask = (row[:, None] < ROWS) & (dim[None, :] < HEAD_DIM)
    line = (batch * HEADS + head).to(tl.int64) * ROWS
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
    own_gradients = (gradient_ptr_0, gradient_ptr_1, gradient_ptr_2)

    queries = tl.load(queries_ptr + place, mask=mask, other=0.0)
    output_gradient = tl.load(output_gradient_ptr + place, mask=mask, other=0.0)
    output = tl.load(output_ptr + place, mask=mask, other=0.0)
    logsumexp = tl.load(logsumexp_ptr + line + row, mask=row < ROWS, other=0.0)
    delta = tl.sum(output.to(tl.float32) * output_gradient.to(tl.float32), 1)
    delta -= tl.load(logsumexp_gradient_ptr + line + row, mask=row < ROWS, other=0.0)
    tl.store(delta_ptr + line + row, delta, mask=row < ROWS)
    # an empty row has only masked entries, whose weights need no finite logsumexp
    logsumexp = tl.where(logsumexp == float("-inf"), 0.0, logsumexp * LOG2E)
    statistics = (output_gradient, logsumexp, delta)

    gradient = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for source in tl.static_range(SOURCES):
        if OWN_QUERIES:
            queries = tl.load(own_queries[source] + place, mask=mask, other=0.0)
            gradient = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        keys, values, begin, before, full, after, start, end = sources[source]
        for index in range(0, before + after):
            edge = begin + (index + tl.where(index < before, 0, full)) * BLOCK_ENTRIES
            gradient = _queries_gradient_visit(
                gradient, queries, statistics, keys, values, edge, start, end, ENTRIES[source],
                factor, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, True, CLEAN[source],
            )  # fmt: skip
        if FULL_TILES[source]:
            begin += before * BLOCK_ENTRIES
            for index in range(0, full):
                gradient = _queries_gradient_visit(
                    gradient, queries, statistics, keys, values,
                    begin + index * BLOCK_ENTRIES, start, end, ENTRIES[source], factor,
                    STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, False, CLEAN[source],
                )  # fmt: skip
        if OWN_QUERIES:
            scaled = (gradient * SCALE).to(gradient_ptr_0.dtype.element_ty)
            tl.store(own_gradients[source] + place, scaled, mask=mask)
    if not OWN_QUERIES:
        scaled = (gradient * SCALE).to(gradient_ptr_0.dtype.element_ty)
        tl.store(gradient_ptr_0 + place, scaled, mask=mask)


@triton.jit
def _entries_gradient_visit(
    keys_gradient,
    values_gradient,
    key,
    value,
    queries_ptr,
    output_gradient_ptr,
    logsumexp_ptr,
    delta_ptr,
    start_ptr,
    end_ptr,
    first,
    entry,
    factor,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds one row tile to the gradients of an entry tile; scores are [entries, rows]."""
    row = first + tl.arange(0, BLOCK_ROWS)
    queries = load_tile(queries_ptr, first, ROWS, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, MASKED)
    output_gradient = load_tile(
        output_gradient_ptr, first, ROWS, STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, MASKED
    ).to(queries.dtype)
    if MASKED:
        logsumexp = tl.load(logsumexp_ptr + row, mask=row < ROWS, other=0.0)
        logsumexp = tl.where(logsumexp == float("-inf"), 0.0, logsumexp)
        delta = tl.load(delta_ptr + row, mask=row < ROWS, other=0.0)
    else:
        logsumexp = tl.load(logsumexp_ptr + row)
        delta = tl.load(delta_ptr + row)
    scores = tl.dot(key, tl.trans(queries), input_precision="ieee")
    weights = tl.math.exp2(scores * factor - (logsumexp * LOG2E)[None, :])
    if MASKED:
        start = tl.load(start_ptr + row, mask=row < ROWS, other=NOWHERE)
        end = tl.load(end_ptr + row, mask=row < ROWS, other=0)
        attended = (entry[:, None] >= start[None, :]) & (entry[:, None] < end[None, :])
        weights = tl.where(attended, weights, 0.0)
    values_gradient = tl.dot(
        weights.to(output_gradient.dtype), output_gradient, values_gradient, input_precision="ieee"
    )
    weights_gradient = tl.dot(value, tl.trans(output_gradient), input_precision="ieee")
    scores_gradient = weights * (weights_gradient - delta[None, :])
    if MASKED:
        # a value that no row attends may be NaN
        scores_gradient = tl.where(attended, scores_gradient, 0.0)
    keys_gradient = tl.dot(
        scores_gradient.to(queries.dtype), queries, keys_gradient, input_precision="ieee"
    )
    return keys_gradient, values_gradient


@triton.jit
def entries_gradient(
    queries_ptr,
    keys_ptr,
    values_ptr,
    start_ptr,
    end_ptr,
    visits_ptr,
    output_gradient_ptr,
    logsumexp_ptr,
    delta_ptr,
    counts_ptr,
    keys_gradient_ptr,
    values_gradient_ptr,
    SCALE: tl.constexpr,
    BOUND_BATCHES: tl.constexpr,
    BOUND_HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FULL_TILES: tl.constexpr,
    IS_PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
) -> None:
    """Gradients of one tile of entries of one KV head; grid (KV heads, entry tiles, batch).

    `visits` are of rows. With IS_PACKED the entries are packed tokens, of which `counts` [batch,
    tokens] are at or before each, and gradients past the last are left unwritten.
    """
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    batch = tl.program_id(2)
    first = tile * BLOCK_ENTRIES
    if IS_PACKED and first >= tl.load(counts_ptr + batch * TOKENS + TOKENS - 1):
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ENTRY_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    ROW_STRIDE: tl.constexpr = HEADS * HEAD_DIM
    factor = SCALE * LOG2E
    bound_line = (batch % BOUND_BATCHES) * BOUND_HEADS + kv_head % BOUND_HEADS
    visits_ptr += (bound_line * tl.num_programs(1) + tile) * 4
    begin, before, full, after = read_visits(visits_ptr, BLOCK_ROWS, FULL_TILES)
    start_ptr += bound_line * ROWS
    end_ptr += bound_line * ROWS
    full_begin = begin + before * BLOCK_ROWS

    entry = first + tl.arange(0, BLOCK_ENTRIES)
    shift = batch.to(tl.int64) * (ENTRIES * ENTRY_STRIDE) + kv_head * HEAD_DIM
    key = load_tile(
        keys_ptr + shift, first, ENTRIES, ENTRY_STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, True
    )
    value = load_tile(
        values_ptr + shift, first, ENTRIES, ENTRY_STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ENTRIES, True
    )
    keys_gradient = tl.zeros([BLOCK_ENTRIES, BLOCK_DIM], tl.float32)
    values_gradient = tl.zeros([BLOCK_ENTRIES, BLOCK_DIM], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        row_shift = batch.to(tl.int64) * (ROWS * ROW_STRIDE) + head * HEAD_DIM
        line = (batch * HEADS + head).to(tl.int64) * ROWS
        if FULL_TILES:
            for index in range(0, full):
                keys_gradient, values_gradient = _entries_gradient_visit(
                    keys_gradient, values_gradient, key, value,
                    queries_ptr + row_shift, output_gradient_ptr + row_shift,
                    logsumexp_ptr + line, delta_ptr + line, start_ptr, end_ptr,
                    full_begin + index * BLOCK_ROWS, entry, factor,
                    ROWS, ROW_STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, False,
                )  # fmt: skip
        for index in range(0, before + after):
            edge = begin + (index + tl.where(index < before, 0, full)) * BLOCK_ROWS
            keys_gradient, values_gradient = _entries_gradient_visit(
                keys_gradient, values_gradient, key, value,
                queries_ptr + row_shift, output_gradient_ptr + row_shift,
                logsumexp_ptr + line, delta_ptr + line, start_ptr, end_ptr,
                edge, entry, factor,
                ROWS, ROW_STRIDE, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, True,
            )  # fmt: skip

    dim = tl.arange(0, BLOCK_DIM)
    place = shift + entry[:, None] * ENTRY_STRIDE + dim[None, :]
    mask = (entry[:, None] < ENTRIES) & (dim[None, :] < HEAD_DIM)
    keys_gradient *= SCALE
    dtype = keys_gradient_ptr.dtype.element_ty
    tl.store(keys_gradient_ptr + place, keys_gradient.to(dtype), mask=mask)
    tl.store(values_gradient_ptr + place, values_gradient.to(dtype), mask=mask)
