"""The portable form: plain JAX over whole blocks, heads grouped, filled or not."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from seqeff_kernels.decode_attention.blocks import CacheBlock, NewEntries

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def obstacle(queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None) -> str | None:
    """Why this backend cannot serve, or None: the portable form serves everything."""
    del queries, blocks, new


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: tuple[CacheBlock, ...],
    new: NewEntries | None,
    scale: float,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `decode_attention`."""
    batch, rows, heads, head_dim = queries.shape
    all_scores, all_values = [], []

    def add(own, keys, values, mask):
        grouped = own.reshape(batch, rows, keys.shape[2], -1, head_dim)
        scores = _dot("brkgd,bekd->bkgre", grouped, keys) * scale
        all_scores.append(jnp.where(mask, scores, -jnp.inf))
        all_values.append(values)

    for block in blocks:
        mask = block.mask()
        # entries beyond may be NaN, and 0 * NaN is NaN
        values = jnp.where(mask[..., None, None], block.values, 0)
        own = queries if block.queries is None else block.queries
        add(own, block.keys, values, mask[:, None, None, None])
    if new is not None:
        add(queries, *new, jnp.tril(jnp.ones((rows, rows), bool)))

    maximum = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in all_scores))
    maximum = jnp.where(jnp.isneginf(maximum), 0, maximum)
    total, weighted = 0, 0
    for scores, values in zip(all_scores, all_values, strict=True):
        weights = jnp.exp(scores - maximum)
        total += weights.sum(-1, keepdims=True)
        weighted += _dot("bkgre,bekd->bkgrd", weights.astype(values.dtype), values)
    output = weighted / jnp.where(total == 0, 1, total)
    logsumexp = maximum + jnp.log(total)
    output, logsumexp = (
        jnp.moveaxis(x, 3, 1).reshape(batch, rows, heads, -1) for x in (output, logsumexp)
    )
    return output.astype(queries.dtype), logsumexp[..., 0]
