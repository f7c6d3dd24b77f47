"""The definition, as dense masks in float32: the oracle of every other backend, for small sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from seqeff_kernels.range_attention.execution import Execution
from seqeff_kernels.range_attention.sources import Source


def obstacle(queries: Array, sources: tuple[Source, ...]) -> str | None:
    """Why this backend cannot serve, or None: the reference serves everything."""
    del queries, sources


def execution(queries: Array, sources: tuple[Source, ...]) -> Execution:
    """How this backend serves a call: by autodiff of whole matrices, as XLA pleases."""
    del queries, sources
    return Execution(backend="reference", plan={}, deterministic=None)


def attend(
    queries: Float[Array, "batch rows heads head_dim"], sources: tuple[Source, ...], scale: float
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `range_attention`. Takes memory and time of rows x entries; gradients by autodiff."""
    batch, rows, heads, head_dim = queries.shape
    kv_heads = sources[0].keys.shape[2]
    all_scores, all_masks, all_values = [], [], []
    for source in sources:
        own, keys, values, start, end = source.listed(rows)
        own = queries if own is None else own
        grouped = own.astype(jnp.float32).reshape(batch, rows, kv_heads, -1, head_dim)
        entry = jnp.arange(keys.shape[1])
        mask = (entry >= start[..., None]) & (entry < end[..., None])
        mask = jnp.broadcast_to(mask, (batch, kv_heads, rows, entry.size))
        # entries outside all ranges may be NaN, and 0 * NaN is NaN
        attended = jnp.swapaxes(mask.any(2), 1, 2)[..., None]
        keys = jnp.where(attended, keys.astype(jnp.float32), 0)
        values = jnp.where(attended, values.astype(jnp.float32), 0)
        scores = jnp.einsum("brkgd,bekd->bkgre", grouped, keys, precision="highest")
        all_scores.append(scores * scale)
        all_masks.append(mask[:, :, None])
        all_values.append(values)

    mask = jnp.concatenate(all_masks, -1)
    scores = jnp.where(mask, jnp.concatenate(all_scores, -1), -jnp.inf)
    empty = ~mask.any(-1, keepdims=True)
    maximum = jax.lax.stop_gradient(jnp.where(empty, 0, scores.max(-1, keepdims=True)))
    weights = jnp.exp(scores - maximum)
    # a sum of 1 in empty rows keeps NaN out of their gradients
    total = jnp.where(empty, 1, weights.sum(-1, keepdims=True))
    logsumexp = jnp.where(empty, -jnp.inf, maximum + jnp.log(total))[..., 0]
    output = jnp.einsum(
        "bkgre,bekd->brkgd", weights / total, jnp.concatenate(all_values, 1), precision="highest"
    )
    logsumexp = jnp.moveaxis(logsumexp, 3, 1).reshape(batch, rows, heads)
    return output.reshape(queries.shape).astype(queries.dtype), logsumexp
