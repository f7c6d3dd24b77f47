"""The GPU backend: the entries split over programs, each reading its own once, and a merge."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from seqeff_kernels import tuning
from seqeff_kernels.decode_attention.blocks import CacheBlock, NewEntries
from seqeff_kernels.decode_attention.merge import merge
from seqeff_kernels.decode_attention.plan import Plan, Sizes, plan, query_tile
from seqeff_kernels.gpu import triton_call, triton_obstacle
from seqeff_kernels.tuning import power_of_two

MAXIMUM_BLOCKS = 3
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 128, 256)
# head sizes with their dtypes, and devices, on which experiments/gpu_checks/attention.py has passed
TESTED = frozenset(itertools.product((64, 80, 96, 128, 256), ("bfloat16", "float16")))
TESTED_CAPABILITIES = ((9, 0),)


def obstacle(queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None) -> str | None:
    """Why this backend cannot serve, or None."""
    missing = triton_obstacle()
    if missing:
        return missing
    if len(blocks) > MAXIMUM_BLOCKS:
        return f"it serves up to {MAXIMUM_BLOCKS} blocks, not {len(blocks)}"
    arrays = [queries, *(new or ())]
    for block in blocks:
        arrays += [block.keys, block.values, *([] if block.queries is None else [block.queries])]
    dtypes = {str(array.dtype) for array in arrays}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"it needs {' or '.join(DTYPES)} throughout, not {' and '.join(sorted(dtypes))}"
    if queries.shape[-1] not in HEAD_DIMS:
        return f"head_dim {queries.shape[-1]} is not one of {HEAD_DIMS}"
    return None


def chosen_plan(queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None) -> Plan:
    """The plan that the table lists, or that of the shapes."""
    sizes = Sizes.of(queries, blocks, new)
    return tuning.planned(
        "decode",
        "triton",
        sizes.key(str(queries.dtype)),
        Plan,
        lambda: plan(sizes, queries.dtype.itemsize),
    )


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: tuple[CacheBlock, ...],
    new: NewEntries | None,
    scale: float,
    planned: Plan | None = None,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `decode_attention`; `planned` replaces `chosen_plan`, for tuning."""
    from seqeff_kernels.decode_attention import triton_kernels

    batch, rows, heads, head_dim = queries.shape
    sizes = Sizes.of(queries, blocks, new)
    kv_heads, points = sizes.kv_heads, sizes.points
    planned = planned or chosen_plan(queries, blocks, new)

    absent = (queries, blocks[0].keys, blocks[0].values, blocks[0].filled)
    inputs = [
        (queries if x.queries is None else x.queries, x.keys, x.values, x.filled) for x in blocks
    ]
    inputs += [absent] * (MAXIMUM_BLOCKS - len(blocks))
    capacities = [keys.shape[1] for _, keys, _, _ in inputs]
    splits = planned.splits
    partial = jnp.float32 if splits > 1 else queries.dtype
    output, logsumexp = triton_call(
        triton_kernels.attend,
        [*(x for block in inputs for x in block), queries, *(new or absent[1:3])],
        [
            jax.ShapeDtypeStruct((batch, splits, rows, heads, head_dim), partial),
            jax.ShapeDtypeStruct((batch, splits, rows, heads), jnp.float32),
        ],
        grid=(kv_heads * -(-points // query_tile(points)), splits, batch),
        num_warps=planned.num_warps,
        num_stages=planned.num_stages,
        CAPACITY_0=capacities[0],
        CAPACITY_1=capacities[1],
        CAPACITY_2=capacities[2],
        BLOCKS=len(blocks),
        NEW=new is not None,
        SCALE=scale,
        ROWS=rows,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=power_of_two(head_dim),
        SPLITS=splits,
        POINTS=query_tile(points),
        TILE=planned.tile_entries,
    )
    output, logsumexp = merge(
        output.reshape(batch, splits, rows * heads, head_dim),
        logsumexp.reshape(batch, splits, rows * heads),
        queries.dtype,
    )
    return output.reshape(queries.shape), logsumexp.reshape(batch, rows, heads)
