"""The public operation and the choice of its backend."""

from __future__ import annotations

from typing import Literal

from jax import Array
from jaxtyping import Float, Int

from seqeff_kernels import gpu
from seqeff_kernels.rotate_and_append import triton, xla

Backend = Literal["auto", "xla", "triton"]

_BACKENDS = {"xla": xla, "triton": triton}


def rotate_and_append(
    joined: Float[Array, "batch rows columns"],
    keys: Float[Array, "batch capacity kv_heads head_dim"],
    values: Float[Array, "batch capacity kv_heads head_dim"],
    slot: Int[Array, "batch rows"],
    rotation: tuple[Float[Array, "batch rows pairs"], Float[Array, "batch rows pairs"]] | None,
    *,
    heads: int,
    bias: Float[Array, " columns"] | None = None,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> tuple[
    Float[Array, "batch rows heads head_dim"],
    Float[Array, "batch capacity kv_heads head_dim"],
    Float[Array, "batch capacity kv_heads head_dim"],
]:
    """Rotated queries, and a cache with rotated new keys and new values.

    Dimensions j and j + pairs of a query or key or, where they are interleaved, 2j and 2j + 1, are
    turned by an angle of which the cosine and sine are given (Su et al. 2021, section 3.2), in
    float32; dimensions from 2 pairs on stay. There is no gradient.

    Args:
      joined: of each new token first the queries of all heads, then keys, then values of all KV
        heads, as one product gives them; further columns are not read.
      keys, values: the cache, of the dtype of `joined`.
      slot: where each new entry goes. One below 0, or at the capacity or past it, is not written;
        no two that are written may be alike in a row of the batch.
      rotation: cosine and sine, float32; None: nothing is rotated.
      heads: of the queries.
      bias: added to every token's columns first, and rounded; of the dtype of `joined`.
      backend: `auto` takes the GPU kernel only for what it is tested on, else the portable form.

    Raises:
      ValueError: a shape does not fit, or the backend asked for cannot serve; says why.
    """
    _check(joined, keys, values, slot, rotation, heads, bias)
    if backend == "auto":
        backend = automatic(joined, keys)
    found = obstacle(joined, keys, backend)
    if found:
        raise ValueError(f"backend {backend!r} cannot append to this cache: {found}")
    form = _BACKENDS[backend].rotate_and_append
    return form(joined, bias, keys, values, slot, rotation, heads, interleaved)


def automatic(
    joined: Float[Array, "batch rows columns"],
    keys: Float[Array, "batch capacity kv_heads head_dim"],
) -> Backend:
    """The backend that `auto` takes here; reads shapes and dtypes only, as `explain` does."""
    served = gpu.covered(triton, keys) and not triton.obstacle(joined, keys)
    return "triton" if served else "xla"


def explain(
    joined: Float[Array, "batch rows columns"],
    keys: Float[Array, "batch capacity kv_heads head_dim"],
) -> dict[str, str]:
    """For every backend, 'available' or why it cannot serve; under 'auto', what it takes."""
    answers = {name: obstacle(joined, keys, name) or "available" for name in _BACKENDS}
    passed_over = ["triton"] if answers["triton"] == "available" else []
    return {"auto": gpu.say_taken(automatic(joined, keys), passed_over, keys), **answers}


def obstacle(
    joined: Float[Array, "batch rows columns"],
    keys: Float[Array, "batch capacity kv_heads head_dim"],
    backend: str,
) -> str | None:
    """Why a backend cannot serve, or None; reads shapes and dtypes only.

    Raises:
      ValueError: there is no backend of that name.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; give auto or one of {list(_BACKENDS)}")
    return _BACKENDS[backend].obstacle(joined, keys)


def _check(
    joined: Array,
    keys: Array,
    values: Array,
    slot: Array,
    rotation: tuple[Array, Array] | None,
    heads: int,
    bias: Array | None,
) -> None:
    """Raises ValueError, naming the argument, if a shape does not fit."""
    if joined.ndim != 3 or keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(
            f"joined, keys and values have shapes {joined.shape}, {keys.shape} and {values.shape}; "
            "give (batch, rows, columns) and twice (batch, capacity, kv_heads, head_dim)"
        )
    batch, _, kv_heads, head_dim = keys.shape
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"heads is {heads}; give a multiple of the cache's {kv_heads} KV heads")
    columns = (heads + 2 * kv_heads) * head_dim
    if joined.shape[0] != batch or joined.shape[2] < columns:
        raise ValueError(
            f"joined has shape {joined.shape}; {heads} heads and {kv_heads} KV heads of {head_dim} "
            f"in a batch of {batch} need ({batch}, rows, {columns} or more)"
        )
    if {str(keys.dtype), str(values.dtype)} != {str(joined.dtype)}:
        raise ValueError(f"keys are {keys.dtype} and values {values.dtype}; joined {joined.dtype}")
    if bias is not None and (bias.shape != joined.shape[2:] or bias.dtype != joined.dtype):
        raise ValueError(
            f"bias has shape {bias.shape} and dtype {bias.dtype}; give {joined.shape[2:]} of "
            f"{joined.dtype}"
        )
    if slot.shape != joined.shape[:2]:
        raise ValueError(f"slot has shape {slot.shape}; give {joined.shape[:2]}")
    if rotation is not None:
        cosine, sine = rotation
        if cosine.shape != sine.shape or cosine.shape[:2] != slot.shape or cosine.ndim != 3:
            raise ValueError(
                f"rotation has shapes {cosine.shape} and {sine.shape}; give twice "
                f"{(*slot.shape, 'pairs')}"
            )
        if 2 * cosine.shape[2] > head_dim:
            raise ValueError(f"rotation has {cosine.shape[2]} pairs; a head has {head_dim // 2}")
