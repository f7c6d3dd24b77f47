"""Token embedding lookup, with a gradient that is deterministic where that is asked for."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROWS_PER_MATMUL = 8192


def embed(
    table: Float[Array, "vocabulary width"],
    tokens: Int[Array, "batch rows"],
    dtype: jnp.dtype,
    gradient: Literal["scatter", "matmul"],
) -> Float[Array, "batch rows width"]:
    """Rows of the table in `dtype`.

    Args:
      gradient: "scatter" adds each row's gradient in place, in no fixed order on GPU; "matmul"
        multiplies with one-hot rows, in a fixed order.
    """
    if gradient == "scatter":
        return jnp.take(table, tokens, axis=0).astype(dtype)
    return _embed(table, tokens, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _embed_forward(
    table: jax.Array, tokens: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _embed(table, tokens, dtype), (table, tokens)


def _embed_backward(
    dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None]:
    table, tokens = saved
    tokens, cotangent = tokens.reshape(-1), cotangent.reshape(-1, cotangent.shape[-1])
    padding = -tokens.size % min(_ROWS_PER_MATMUL, tokens.size)
    # padded rows carry a zero gradient
    tokens = jnp.pad(tokens, (0, padding))
    cotangent = jnp.pad(cotangent, ((0, padding), (0, 0)))
    chunk = min(_ROWS_PER_MATMUL, tokens.size)

    def add(total: jax.Array, rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        ids, gradient = rows
        hot = jax.nn.one_hot(ids, table.shape[0], dtype=gradient.dtype)
        return total + jnp.einsum(
            "rv,rw->vw", hot, gradient, preferred_element_type=jnp.float32
        ), None

    total, _ = jax.lax.scan(
        add,
        jnp.zeros(table.shape, jnp.float32),
        (tokens.reshape(-1, chunk), cotangent.reshape(-1, chunk, cotangent.shape[-1])),
    )
    return total.astype(table.dtype), None


_embed.defvjp(_embed_forward, _embed_backward)
