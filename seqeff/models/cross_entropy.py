"""Cross-entropy of an output head, with at most 1 GiB of float32 logits at a time.

Fewer than 2^28 logits are one chunk; beyond, rows are cut so that no chunk has more, down to one
row of every batch element.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LOGITS_PER_CHUNK = 2**28


class CrossEntropy(NamedTuple):
    """Weighted sums over all rows, in nats: the loss itself and the squared log-partition."""

    loss: Float[Array, ""]
    log_partition_squared: Float[Array, ""]


def cross_entropy_sums(
    hidden: Float[Array, "batch rows width"],
    head: Float[Array, "vocabulary width"],
    targets: Int[Array, "batch rows"],
    weights: Float[Array, "batch rows"],
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], CrossEntropy]:
    """Sum over rows of weight * (cross-entropy + z_loss * log_partition^2), and its parts.

    The gradient is made in the forward pass, a chunk of rows at a time: the logits are computed
    once, at most 1 GiB of them at a time. Differentiable in `hidden` and `head` through the first
    result only; z-loss is that of PaLM (arXiv 2204.02311, section 5).
    """
    return _sums(hidden, head, targets, weights, z_loss)


def token_losses(
    hidden: Float[Array, "batch rows width"],
    head: Float[Array, "vocabulary width"],
    targets: Int[Array, "batch rows"],
) -> Float[Array, "batch rows"]:
    """Cross-entropy of every row in nats, float32; for evaluation, in the same chunks."""

    def one(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        rows, wanted = chunk
        logits = _logits(rows, head)
        return None, jax.nn.logsumexp(logits, axis=-1) - _at(logits, wanted)

    _, losses = jax.lax.scan(one, None, (_chunks(hidden, head), _chunks(targets, head)))
    return _join(losses, hidden.shape[1])


def _logits(rows: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.einsum(
        "brw,vw->brv", rows, head.astype(rows.dtype), preferred_element_type=jnp.float32
    )


def _at(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _chunks(array: jax.Array, head: jax.Array) -> jax.Array:
    """[batch, rows, ...] to [chunks, batch, rows / chunks, ...], the last padded with zeros.

    Rows are cut, not the batch, which may be spread over devices.
    """
    batch, rows = array.shape[:2]
    size = max(1, min(rows, _LOGITS_PER_CHUNK // (batch * head.shape[0])))
    count = -(-rows // size)
    size = -(-rows // count)
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, count * size - rows)
    padded = jnp.pad(array, padding).reshape(batch, count, size, *array.shape[2:])
    return jnp.moveaxis(padded, 1, 0)


def _join(chunks: jax.Array, rows: int) -> jax.Array:
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :rows]


def _chunk_sums(
    rows: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, CrossEntropy]:
    logits = _logits(rows, head)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    losses = log_partition - _at(logits, targets)
    sums = CrossEntropy(
        loss=jnp.sum(weights * losses),
        log_partition_squared=jnp.sum(weights * jnp.square(log_partition)),
    )
    return logits, log_partition, sums


def _total(sums: CrossEntropy, z_loss: float) -> tuple[jax.Array, CrossEntropy]:
    return sums.loss + z_loss * sums.log_partition_squared, sums


def _zero() -> CrossEntropy:
    return CrossEntropy(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float
) -> tuple[jax.Array, CrossEntropy]:
    def one(total: CrossEntropy, chunk: tuple[jax.Array, ...]) -> tuple[CrossEntropy, None]:
        rows, wanted, weight = chunk
        _, _, sums = _chunk_sums(rows, head, wanted, weight)
        return jax.tree.map(jnp.add, total, sums), None

    chunks = tuple(_chunks(array, head) for array in (hidden, targets, weights))
    return _total(jax.lax.scan(one, _zero(), chunks)[0], z_loss)


def _sums_forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float
) -> tuple[tuple[jax.Array, CrossEntropy], tuple[jax.Array, jax.Array]]:
    def one(
        carry: tuple[CrossEntropy, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[CrossEntropy, jax.Array], jax.Array]:
        total, head_gradient = carry
        rows, wanted, weight = chunk
        logits, log_partition, sums = _chunk_sums(rows, head, wanted, weight)
        scale = weight * (1 + 2 * z_loss * log_partition)
        probabilities = jnp.exp(logits - log_partition[..., None])
        hit = wanted[..., None] == jnp.arange(head.shape[0])
        gradient = scale[..., None] * probabilities - jnp.where(hit, weight[..., None], 0)
        gradient = gradient.astype(rows.dtype)
        rows_gradient = jnp.einsum("brv,vw->brw", gradient, head.astype(rows.dtype))
        head_gradient = head_gradient + jnp.einsum(
            "brv,brw->vw", gradient, rows, preferred_element_type=jnp.float32
        )
        return (jax.tree.map(jnp.add, total, sums), head_gradient), rows_gradient

    chunks = tuple(_chunks(array, head) for array in (hidden, targets, weights))
    start = (_zero(), jnp.zeros(head.shape, jnp.float32))
    (total, head_gradient), rows_gradient = jax.lax.scan(one, start, chunks)
    return _total(total, z_loss), (
        _join(rows_gradient, hidden.shape[1]),
        head_gradient.astype(head.dtype),
    )


def _sums_backward(
    z_loss: float,
    saved: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, CrossEntropy],
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden_gradient, head_gradient = saved
    cotangent = cotangents[0]
    return (
        (hidden_gradient * cotangent).astype(hidden_gradient.dtype),
        head_gradient * cotangent,
        None,
        None,
    )


_sums.defvjp(_sums_forward, _sums_backward)
