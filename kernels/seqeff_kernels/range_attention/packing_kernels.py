"""Triton kernels that pack tokens and add packed gradients to the tokens'; see `operands.py`."""

import triton
import triton.language as tl


@triton.jit
def gather(
    keys_ptr,
    values_ptr,
    indices_ptr,
    counts_ptr,
    packed_keys_ptr,
    packed_values_ptr,
    TOKENS: tl.constexpr,
    CAPACITY: tl.constexpr,
    FEATURES: tl.constexpr,
    CLEARED: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
) -> None:
    """Packs the chosen tokens' keys and values; grid (entry tiles, feature tiles, batch).

    Entries after the last chosen token are 0 up to a multiple of CLEARED, and unwritten from there
    on. A row of the batch whose chosen tokens exceed the capacity becomes NaN.
    """
    first = tl.program_id(0) * BLOCK_ENTRIES
    batch = tl.program_id(2)
    count = tl.load(counts_ptr + batch * TOKENS + TOKENS - 1)
    if first >= tl.cdiv(count, CLEARED) * CLEARED:
        return
    entry = first + tl.arange(0, BLOCK_ENTRIES)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = (entry < CAPACITY)[:, None] & (feature < FEATURES)[None, :]
    chosen = inside & (entry < count)[:, None]
    token = tl.load(indices_ptr + batch * CAPACITY + entry, mask=entry < CAPACITY, other=0)
    # a row of the batch may have 2^31 elements or more
    source = (batch.to(tl.int64) * TOKENS + token)[:, None] * FEATURES + feature[None, :]
    target = (batch.to(tl.int64) * CAPACITY + entry)[:, None] * FEATURES + feature[None, :]
    keys = tl.load(keys_ptr + source, mask=chosen, other=0.0)
    values = tl.load(values_ptr + source, mask=chosen, other=0.0)
    if CAPACITY < TOKENS:
        spoiled = tl.where(count > CAPACITY, float("nan"), 0.0)
        keys = (keys + spoiled).to(keys.dtype)
        values = (values + spoiled).to(values.dtype)
    tl.store(packed_keys_ptr + target, keys, mask=inside)
    tl.store(packed_values_ptr + target, values, mask=inside)


@triton.jit
def add(
    keys_ptr,
    values_ptr,
    packed_keys_ptr,
    packed_values_ptr,
    indices_ptr,
    counts_ptr,
    keys_total_ptr,
    values_total_ptr,
    TOKENS: tl.constexpr,
    CAPACITY: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
) -> None:
    """Adds packed entries to their tokens, in the tokens' memory; grid as that of `gather`."""
    first = tl.program_id(0) * BLOCK_ENTRIES
    batch = tl.program_id(2)
    count = tl.load(counts_ptr + batch * TOKENS + TOKENS - 1)
    if first >= count:
        return
    entry = first + tl.arange(0, BLOCK_ENTRIES)
    feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    chosen = (entry < tl.minimum(count, CAPACITY))[:, None] & (feature < FEATURES)[None, :]
    token = tl.load(indices_ptr + batch * CAPACITY + entry, mask=entry < CAPACITY, other=0)
    target = (batch.to(tl.int64) * TOKENS + token)[:, None] * FEATURES + feature[None, :]
    source = (batch.to(tl.int64) * CAPACITY + entry)[:, None] * FEATURES + feature[None, :]
    keys = tl.load(keys_ptr + target, mask=chosen).to(tl.float32)
    keys += tl.load(packed_keys_ptr + source, mask=chosen).to(tl.float32)
    values = tl.load(values_ptr + target, mask=chosen).to(tl.float32)
    values += tl.load(packed_values_ptr + source, mask=chosen).to(tl.float32)
    tl.store(keys_total_ptr + target, keys.to(keys_total_ptr.dtype.element_ty), mask=chosen)
    tl.store(values_total_ptr + target, values.to(values_total_ptr.dtype.element_ty), mask=chosen)
