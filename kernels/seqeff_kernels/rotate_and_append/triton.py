"""The GPU backend: one kernel, which writes the cache in place."""

from __future__ import annotations

import itertools

import jax
from jax import Array
from jaxtyping import Float, Int

from seqeff_kernels.gpu import triton_call, triton_obstacle
from seqeff_kernels.tuning import power_of_two

# head sizes with their dtypes, and devices, on which experiments/gpu_checks/attention.py has passed
TESTED = frozenset(itertools.product((64, 80, 96, 128, 256), ("bfloat16", "float16")))
TESTED_CAPABILITIES = ((9, 0),)
DTYPES = ("bfloat16", "float16", "float32")
# tokens of a program: one where there are few, as in decoding, and the chip is to be filled
_MOST_TOKENS = 16
_FEW_TOKENS = 1024


def obstacle(joined: Array, keys: Array) -> str | None:
    """Why this backend cannot serve, or None."""
    del joined
    if str(keys.dtype) not in DTYPES:
        return f"it needs {', '.join(DTYPES)}, not {keys.dtype}"
    return triton_obstacle()


def rotate_and_append(
    joined: Float[Array, "batch rows columns"],
    bias: Float[Array, " columns"] | None,
    keys: Float[Array, "batch capacity kv_heads head_dim"],
    values: Float[Array, "batch capacity kv_heads head_dim"],
    slot: Int[Array, "batch rows"],
    rotation: tuple[Float[Array, "batch rows pairs"], Float[Array, "batch rows pairs"]] | None,
    heads: int,
    interleaved: bool,
) -> tuple[Array, Array, Array]:
    """See `api.rotate_and_append`."""
    from seqeff_kernels.rotate_and_append import triton_kernels

    batch, rows, columns = joined.shape
    capacity, kv_heads, head_dim = keys.shape[1:]
    tokens = batch * rows
    tile = 1 if tokens <= _FEW_TOKENS else _MOST_TOKENS
    # what is absent is not read
    cosine, sine = (joined, joined) if rotation is None else rotation
    queries, keys, values = triton_call(
        triton_kernels.rotate_and_append,
        [joined, joined if bias is None else bias, cosine, sine, slot, keys, values],
        [
            jax.ShapeDtypeStruct((batch, rows, heads, head_dim), joined.dtype),
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ],
        grid=(max(heads, kv_heads), -(-tokens // tile), 1),
        num_warps=1 if tile == 1 else 4,
        num_stages=1,
        aliases={5: 1, 6: 2},
        TOKENS=tokens,
        ROWS=rows,
        COLUMNS=columns,
        CAPACITY=capacity,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=power_of_two(head_dim),
        PAIRS=0 if rotation is None else cosine.shape[2],
        INTERLEAVED=interleaved,
        HAS_BIAS=bias is not None,
        TILE=tile,
    )
    return queries, keys, values
