"""The Triton kernel; README.md derives it. Importing this needs triton."""

import triton
import triton.language as tl


@triton.jit
def rotate_and_append(
    joined,
    bias,
    cosine,
    sine,
    slots,
    keys_before,
    values_before,
    queries,
    keys,
    values,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A query head and a KV head of TILE tokens; grid (heads, tiles of tokens).

    The cache's memory is that of `keys_before` and `values_before`, which are not read.
    """
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, PADDED_DIM)
    inside = (token < TOKENS)[:, None] & (column < HEAD_DIM)[None, :]
    row = joined + token[:, None] * COLUMNS
    if head < HEADS:
        first = head * HEAD_DIM
        turned = _rotated(
            row, bias, first, cosine, sine, token, column, inside, PAIRS, INTERLEAVED, HAS_BIAS
        )
        place = (token * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
        tl.store(queries + place, turned, inside)
    if head < KV_HEADS:
        slot = tl.load(slots + token, mask=token < TOKENS, other=-1)
        written = inside & ((slot >= 0) & (slot < CAPACITY))[:, None]
        entry = (token // ROWS * CAPACITY + slot) * KV_HEADS + head
        place = entry[:, None] * HEAD_DIM + column[None, :]
        first = (HEADS + head) * HEAD_DIM
        turned = _rotated(
            row, bias, first, cosine, sine, token, column, inside, PAIRS, INTERLEAVED, HAS_BIAS
        )
        tl.store(keys + place, turned, written)
        first += KV_HEADS * HEAD_DIM
        tl.store(values + place, _columns(row, bias, first + column, inside, HAS_BIAS), written)


@triton.jit
def _rotated(
    row,
    bias,
    first,
    cosine,
    sine,
    token,
    column,
    inside,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The vectors that begin at column `first`."""
    own = _columns(row, bias, first + column, inside, HAS_BIAS)
    if PAIRS == 0:
        return own
    if INTERLEAVED:
        pair = column // 2
        partner = column ^ 1
        is_first = column % 2 == 0
    else:
        pair = column % PAIRS
        is_first = column < PAIRS
        partner = tl.where(is_first, column + PAIRS, column - PAIRS)
    turns = inside & (column < 2 * PAIRS)[None, :]
    other = _columns(row, bias, first + partner, turns, HAS_BIAS).to(tl.float32)
    angle = token[:, None] * PAIRS + pair[None, :]
    across = tl.load(sine + angle, turns, other=0.0)
    across = tl.where(is_first[None, :], -across, across)
    turned = own.to(tl.float32) * tl.load(cosine + angle, turns, other=1.0) + other * across
    return tl.where(turns, turned.to(own.dtype), own)


@triton.jit
def _columns(row, bias, column, inside, HAS_BIAS: tl.constexpr):
    found = tl.load(row + column[None, :], inside, other=0.0)
    if HAS_BIAS:
        added = tl.load(bias + column[None, :], inside, other=0.0)
        found = (found.to(tl.float32) + added.to(tl.float32)).to(found.dtype)
    return found
