"""Merging what the splits of a cache gave."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqeff_kernels import gpu
from seqeff_kernels.tuning import power_of_two

# of partial outputs, that a program merges: a launch of many small ones takes longer than its reads
_PROGRAM_NUMBERS = 2048
_LEAST_COLUMNS = 64


def merge(
    output: Float[Array, "batch splits points head_dim"],
    logsumexp: Float[Array, "batch splits points"],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "batch points head_dim"], Float[Array, "batch points"]]:
    """One softmax of the splits', in the order of their indices; a point is a row and a head.

    The output of a split without entries, of logsumexp -inf, may be NaN.
    """
    batch, splits, points, head_dim = output.shape
    if splits == 1:
        return output[:, 0].astype(dtype), logsumexp[:, 0]
    if gpu.triton_obstacle():
        return merge_portably(output, logsumexp, dtype)
    from seqeff_kernels.decode_attention import triton_kernels

    padded = power_of_two(splits)
    columns = min(power_of_two(head_dim), max(_LEAST_COLUMNS, _PROGRAM_NUMBERS // padded))
    tile = min(power_of_two(points), max(1, _PROGRAM_NUMBERS // (padded * columns)))
    merged, total = gpu.triton_call(
        triton_kernels.merge,
        [output, logsumexp],
        [
            jax.ShapeDtypeStruct((batch, points, head_dim), dtype),
            jax.ShapeDtypeStruct((batch, points), jnp.float32),
        ],
        grid=(-(-points // tile), batch, -(-head_dim // columns)),
        num_warps=4,
        num_stages=1,
        POINTS=points,
        HEAD_DIM=head_dim,
        SPLITS=splits,
        PADDED_SPLITS=padded,
        TILE=tile,
        COLUMNS=columns,
    )
    return merged, total


def merge_portably(
    output: Float[Array, "batch splits points head_dim"],
    logsumexp: Float[Array, "batch splits points"],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "batch points head_dim"], Float[Array, "batch points"]]:
    """As `merge`, in plain JAX."""
    maximum = logsumexp.max(1)
    finite = jnp.where(jnp.isneginf(maximum), 0, maximum)
    weights = jnp.exp(logsumexp - finite[:, None])
    total = weights.sum(1)
    used = jnp.where(weights[..., None] > 0, output, 0)
    merged = (used * weights[..., None]).sum(1) / jnp.where(total == 0, 1, total)[..., None]
    return merged.astype(dtype), maximum + jnp.log(total)
