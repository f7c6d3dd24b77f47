"""The portable form, and its parts."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def obstacle(joined: Array, keys: Array) -> str | None:
    """It serves everything."""
    del joined, keys
    return None


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
    if bias is not None:
        joined = joined + bias
    kv_heads, head_dim = keys.shape[2:]
    ends = [heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim]
    new = jnp.split(joined[..., : ends[-1]], ends[:-1], axis=-1)
    queries, new_keys, new_values = (x.reshape(*x.shape[:2], -1, head_dim) for x in new)
    if rotation is not None:
        cosine, sine = (x[:, :, None] for x in rotation)
        queries, new_keys = (rotate(x, cosine, sine, interleaved) for x in (queries, new_keys))
    return queries, put(keys, slot, new_keys), put(values, slot, new_values)


def rotate(
    x: Float[Array, "batch rows heads head_dim"],
    cosine: Float[Array, "batch rows 1 pairs"],
    sine: Float[Array, "batch rows 1 pairs"],
    interleaved: bool,
) -> Float[Array, "batch rows heads head_dim"]:
    """Rotated heads, of the first dimensions, in float32; the others stay."""
    pairs = cosine.shape[-1]
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    first, second = first * cosine - second * sine, second * cosine + first * sine
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def put(
    array: Shaped[Array, "batch slots *features"],
    slot: Int[Array, "batch rows"],
    new: Shaped[Array, "batch rows *features"],
) -> Shaped[Array, "batch slots *features"]:
    """Writes entries to slots, no two of them to the same, and those of no slot nowhere."""
    line, capacity = jnp.arange(array.shape[0])[:, None], array.shape[1]
    # past the end, and there each at a place of its own: they are unique, and thus quick to write
    nowhere = capacity + jnp.arange(slot.shape[1])
    slot = jnp.where((slot >= 0) & (slot < capacity), slot, nowhere)
    return array.at[line, slot].set(new.astype(array.dtype), mode="drop", unique_indices=True)
