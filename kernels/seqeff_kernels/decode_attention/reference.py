"""The definition, as dense masks in float32: the oracle of every other backend, for small sizes."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from seqeff_kernels.decode_attention.blocks import CacheBlock, NewEntries


def obstacle(queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None) -> str | None:
    """Why this backend cannot serve, or None: the reference serves everything."""
    del queries, blocks, new


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: tuple[CacheBlock, ...],
    new: NewEntries | None,
    scale: float,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `decode_attention`. Repeats the entries for every head of a group."""
    batch, rows, heads, _ = queries.shape
    pieces = []
    for block in blocks:
        filled = block.mask()
        # entries beyond may be NaN, and 0 * NaN is NaN
        attended = filled[..., None, None]
        keys, values = (jnp.where(attended, x, 0) for x in (block.keys, block.values))
        mask = jnp.broadcast_to(filled[:, None], (batch, rows, filled.shape[1]))
        pieces.append((queries if block.queries is None else block.queries, keys, values, mask))
    if new is not None:
        causal = jnp.tril(jnp.ones((rows, rows), bool))
        pieces.append((queries, *new, jnp.broadcast_to(causal, (batch, rows, rows))))

    all_scores, all_values, all_masks = [], [], []
    for own, keys, values, mask in pieces:
        group = heads // keys.shape[2]
        keys, values = (jnp.repeat(x.astype(jnp.float32), group, 2) for x in (keys, values))
        own = own.astype(jnp.float32)
        all_scores.append(jnp.einsum("brhd,behd->brhe", own, keys, precision="highest") * scale)
        all_values.append(values)
        all_masks.append(mask[:, :, None])

    mask = jnp.concatenate(all_masks, -1)
    scores = jnp.where(mask, jnp.concatenate(all_scores, -1), -jnp.inf)
    empty = ~mask.any(-1, keepdims=True)
    maximum = jnp.where(empty, 0, scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - maximum)
    total = weights.sum(-1, keepdims=True)
    logsumexp = (maximum + jnp.log(total))[..., 0]
    output = jnp.einsum(
        "brhe,behd->brhd",
        weights / jnp.where(empty, 1, total),
        jnp.concatenate(all_values, 1),
        precision="highest",
    )
    return output.astype(queries.dtype), logsumexp
