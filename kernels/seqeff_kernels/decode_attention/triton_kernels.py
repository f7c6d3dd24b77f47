"""The Triton kernels; README.md derives them. Importing this needs triton."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    queries_0,
    keys_0,
    values_0,
    filled_0,
    queries_1,
    keys_1,
    values_1,
    filled_1,
    queries_2,
    keys_2,
    values_2,
    filled_2,
    new_queries,
    new_keys,
    new_values,
    output,
    logsumexp,
    CAPACITY_0: tl.constexpr,
    CAPACITY_1: tl.constexpr,
    CAPACITY_2: tl.constexpr,
    BLOCKS: tl.constexpr,
    NEW: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    POINTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Attends one split of the entries of one KV head of one row of the batch.

    The filled tiles of all blocks, then those of the new entries, are one list, which is cut
    evenly in SPLITS. A program serves POINTS of the query rows and heads of its KV head. Writes
    the split's own output `[batch, SPLITS, ROWS, HEADS, HEAD_DIM]` and logsumexp.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    POINT_TILES: tl.constexpr = (ROWS * GROUP + POINTS - 1) // POINTS
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    queries = (queries_0, queries_1, queries_2)
    keys = (keys_0, keys_1, keys_2)
    values = (values_0, values_1, values_2)
    filled = (filled_0, filled_1, filled_2)
    capacities = (CAPACITY_0, CAPACITY_1, CAPACITY_2)

    # the KV heads of an entry are neighbours in memory, and so in time
    kv_head = tl.program_id(0) // POINT_TILES
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    point = tl.program_id(0) % POINT_TILES * POINTS + tl.arange(0, POINTS)
    row = point // GROUP
    head = kv_head * GROUP + point % GROUP
    asked = row < ROWS
    result = ((batch * SPLITS + split) * ROWS + row) * HEADS + head

    tiles = (ROWS + TILE - 1) // TILE if NEW else 0
    for index in tl.static_range(BLOCKS):
        tiles += tl.cdiv(_length(filled[index] + batch, capacities[index]), TILE)
    first = tiles * split // SPLITS
    last = tiles * (split + 1) // SPLITS
    if SPLITS > 1:  # noqa: SIM102 - decided while compiling
        if first == last:
            tl.store(logsumexp + result, tl.full([POINTS], float("-inf"), tl.float32), asked)
            return

    column = tl.arange(0, PADDED_DIM)
    query_mask = asked[:, None] & (column < HEAD_DIM)[None, :]
    query = ((batch * ROWS + row) * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
    maximum = tl.full([POINTS], float("-inf"), tl.float32)
    total = tl.zeros([POINTS], tl.float32)
    weighted = tl.zeros([POINTS, PADDED_DIM], tl.float32)
    for index in tl.static_range(BLOCKS):
        length = _length(filled[index] + batch, capacities[index])
        offset = batch * capacities[index] * STRIDE + kv_head * HEAD_DIM
        maximum, total, weighted = _add_block(
            tl.load(queries[index] + query, mask=query_mask, other=0.0),
            keys[index] + offset,
            values[index] + offset,
            first,
            last,
            length // TILE,
            length,
            tl.full([POINTS], length, tl.int32),
            maximum,
            total,
            weighted,
            SCALE,
            STRIDE,
            HEAD_DIM,
            TILE,
        )
        first -= tl.cdiv(length, TILE)
        last -= tl.cdiv(length, TILE)
    if NEW:
        offset = batch * ROWS * STRIDE + kv_head * HEAD_DIM
        maximum, total, weighted = _add_block(
            tl.load(new_queries + query, mask=query_mask, other=0.0),
            new_keys + offset,
            new_values + offset,
            first,
            last,
            0,
            ROWS,
            row + 1,
            maximum,
            total,
            weighted,
            SCALE,
            STRIDE,
            HEAD_DIM,
            TILE,
        )

    weighted = weighted / tl.where(total == 0, 1.0, total)[:, None]
    location = result[:, None] * HEAD_DIM + column[None, :]
    tl.store(output + location, weighted.to(output.dtype.element_ty), query_mask)
    tl.store(logsumexp + result, (maximum + tl.log2(total)) / LOG2_E, asked)


@triton.jit
def _length(filled, capacity):
    return tl.minimum(tl.maximum(tl.load(filled), 0), capacity).to(tl.int32)


@triton.jit
def _add_block(
    queries,
    keys,
    values,
    first,
    last,
    unmasked,
    length,
    limit,
    maximum,
    total,
    weighted,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds the tiles `[first, last)` of a block of `length` entries to the online softmax.

    The first `unmasked` tiles are attended whole; in the others a point attends the entries
    below its `limit`.
    """
    PADDED_DIM: tl.constexpr = queries.shape[1]
    PADDING: tl.constexpr = PADDED_DIM != HEAD_DIM
    first = tl.maximum(first, 0)
    last = tl.minimum(last, tl.cdiv(length, TILE))
    unmasked = tl.minimum(last, unmasked)
    entry = tl.arange(0, TILE)
    column = tl.arange(0, PADDED_DIM)
    inside = (column < HEAD_DIM)[None, :]
    location = entry[:, None] * STRIDE + column[None, :]

    for tile in tl.range(first, unmasked):
        offset = tl.cast(tile, tl.int64) * (TILE * STRIDE)
        if PADDING:
            tile_keys = tl.load(keys + offset + location, mask=inside, other=0.0)
            tile_values = tl.load(values + offset + location, mask=inside, other=0.0)
        else:
            tile_keys = tl.load(keys + offset + location)
            tile_values = tl.load(values + offset + location)
        scores = _scores(queries, tile_keys, SCALE)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        maximum, total, weighted = _add_tile(
            scores, tile_values, new_maximum, maximum, total, weighted
        )

    # a loop of rarely more than one step
    for tile in tl.range(tl.maximum(first, unmasked), last, num_stages=1):
        offset = tl.cast(tile, tl.int64) * (TILE * STRIDE)
        index = tile * TILE + entry
        # what lies beyond may be NaN, and 0 * NaN is NaN
        mask = (index < length)[:, None] & inside
        tile_keys = tl.load(keys + offset + location, mask=mask, other=0.0)
        tile_values = tl.load(values + offset + location, mask=mask, other=0.0)
        scores = _scores(queries, tile_keys, SCALE)
        scores = tl.where(index[None, :] < limit[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # -inf for a point that has attended nothing yet, and -inf - -inf is NaN
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        _, total, weighted = _add_tile(scores, tile_values, finite, maximum, total, weighted)
        maximum = new_maximum
    return maximum, total, weighted


@triton.jit
def _scores(queries, keys, SCALE: tl.constexpr):
    """In powers of two."""
    return tl.dot(queries, tl.trans(keys)) * (SCALE * LOG2_E)


@triton.jit
def _add_tile(scores, values, new_maximum, maximum, total, weighted):
    weights = tl.exp2(scores - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, 1)
    weighted = weighted * correction[:, None]
    weighted = tl.dot(weights.to(values.dtype), values, weighted)
    return new_maximum, total, weighted


@triton.jit
def merge(
    partial_output,
    partial_logsumexp,
    output,
    logsumexp,
    POINTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Merges the splits of TILE of the POINTS rows and heads of a batch row, in fixed order."""
    point = tl.program_id(0) * TILE + tl.arange(0, TILE)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, PADDED_SPLITS)
    asked = point < POINTS
    partial = (batch * SPLITS + split)[None, :] * POINTS + point[:, None]
    present = asked[:, None] & (split < SPLITS)[None, :]
    parts = tl.load(partial_logsumexp + partial, mask=present, other=float("-inf"))
    maximum = tl.max(parts, 1)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp2((parts - finite[:, None]) * LOG2_E)
    total = tl.sum(weights, 1)

    # the output of a split without entries was never written
    mask = (weights > 0)[:, :, None] & (column < HEAD_DIM)[None, None, :]
    location = partial[:, :, None] * HEAD_DIM + column[None, None, :]
    outputs = tl.load(partial_output + location, mask=mask, other=0.0)
    merged = tl.sum(outputs * weights[:, :, None], 1)
    merged = merged / tl.where(total == 0, 1.0, total)[:, None]
    result = batch * POINTS + point
    tl.store(
        output + result[:, None] * HEAD_DIM + column[None, :],
        merged.to(output.dtype.element_ty),
        mask=asked[:, None] & (column < HEAD_DIM)[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(logsumexp + result, maximum + tl.log2(total) / LOG2_E, asked)
