"""What the Triton kernels share.

Arrays are row-major: queries and outputs [batch, rows, heads, head_dim], entries [batch, entries,
kv_heads, head_dim], bounds [batch or 1, kv_heads or 1, rows], visits [batch or 1, kv_heads or 1,
tiles, 4], statistics [batch, heads, rows].
"""

import triton
import triton.language as tl

# finite, so that the difference of two of them is 0 and not NaN
LOWEST = tl.constexpr(-1.0e30)
# above every entry, with room for adding a tile
NOWHERE = tl.constexpr(1 << 30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def read_visits(visits_ptr, BLOCK: tl.constexpr, FULL_TILES: tl.constexpr):
    """Where the tiles of a visit begin; how many are edge tiles, full tiles, edge tiles again.

    A visit is four numbers: the first line, the first of those that need no mask, the one after
    the last of those, the one after the last.
    """
    first = tl.load(visits_ptr)
    last = tl.load(visits_ptr + 3)
    begin = first // BLOCK * BLOCK
    count = tl.maximum(tl.cdiv(last - begin, BLOCK), 0)
    if FULL_TILES:
        full_begin = tl.cdiv(tl.load(visits_ptr + 1), BLOCK) * BLOCK
        full_end = tl.load(visits_ptr + 2) // BLOCK * BLOCK
        full = tl.maximum(full_end - full_begin, 0) // BLOCK
        before = tl.where(full > 0, (full_begin - begin) // BLOCK, 0)
        return begin, before, full, count - before - full
    return begin, count, 0, 0


@triton.jit
def load_tile(
    lines,
    first,
    COUNT,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loads BLOCK lines of HEAD_DIM; those past the last are 0, and never read if MASKED."""
    line = first + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_DIM)
    pointers = lines + line[:, None] * STRIDE + dim[None, :]
    if MASKED:
        mask = line[:, None] < COUNT
        if BLOCK_DIM != HEAD_DIM:
            mask = mask & (dim[None, :] < HEAD_DIM)
        return tl.load(pointers, mask=mask, other=0.0)
    if BLOCK_DIM != HEAD_DIM:
        return tl.load(pointers, mask=dim[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def see_source(
    keys_ptr,
    values_ptr,
    start_ptr,
    end_ptr,
    visits_ptr,
    batch,
    kv_head,
    tile,
    row,
    BOUND_BATCHES: tl.constexpr,
    BOUND_HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    FULL_TILES: tl.constexpr,
):
    """A source as a tile of rows sees it: its KV head, the tiles to visit, the rows' bounds."""
    line = (batch % BOUND_BATCHES) * BOUND_HEADS + kv_head % BOUND_HEADS
    begin, before, full, after = read_visits(
        visits_ptr + (line * tl.num_programs(1) + tile) * 4, BLOCK_ENTRIES, FULL_TILES
    )
    # rows past the last repeat it
    offset = line * ROWS + tl.minimum(row, ROWS - 1)
    start = tl.load(start_ptr + offset)
    end = tl.load(end_ptr + offset)
    shift = batch.to(tl.int64) * (ENTRIES * KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
    return keys_ptr + shift, values_ptr + shift, begin, before, full, after, start, end
