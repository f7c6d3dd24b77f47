"""cuDNN's fused attention, for dense causal attention and pure windows on NVIDIA GPUs.

It is called below `jax.nn.dot_product_attention`, which would round the logsumexp to the output's
dtype.
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.lib import cuda_versions
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from seqeff_kernels import gpu
from seqeff_kernels.range_attention import xla
from seqeff_kernels.range_attention.execution import Execution
from seqeff_kernels.range_attention.sources import Source, TokenSource

# head sizes with their dtypes, and devices, on which experiments/gpu_checks/attention.py has passed
TESTED = frozenset(itertools.product((64, 80, 96, 128, 256), ("bfloat16", "float16")))
TESTED_CAPABILITIES = ((9, 0),)
# of XLA, which ask for the same bits every time
_DETERMINISM_FLAGS = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")


@dataclass(frozen=True)
class Plan:
    """Nothing: cuDNN makes its own."""


def obstacle(queries: Array, sources: tuple[Source, ...]) -> str | None:
    """Why this backend cannot serve, or None."""
    capability = gpu.compute_capability()
    if capability is None:
        return f"it needs a CUDA device; the default backend is {jax.default_backend()}"
    if cuda_versions is None:
        return "jax was installed without cuDNN"
    source = sources[0]
    if len(sources) != 1 or not isinstance(source, TokenSource):
        return "it serves one TokenSource"
    own = queries if source.queries is None else source.queries
    dtypes = {str(array.dtype) for array in (own, source.keys, source.values)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        return f"it needs bfloat16 or float16 throughout, not {' and '.join(sorted(dtypes))}"
    head_dim, largest = own.shape[-1], 256 if capability >= (9, 0) else 128
    if head_dim % 8 or head_dim > largest:
        return f"head_dim {head_dim} is not a multiple of 8 up to {largest}"
    if own.shape[1] % 2:
        return f"its backward pass needs an even number of rows, not {own.shape[1]}"
    if source.document_start is not None:
        return "it does not separate packed documents"
    if not source.begins_at_first_token or own.shape[1] != source.keys.shape[1]:
        return "its rows must be all the tokens, from the first"
    return None


def execution(queries: Array, sources: tuple[Source, ...]) -> Execution:
    """How this backend serves a call: in tiles of its own; gradients are sums in any order."""
    del queries, sources
    asked = any(flag in os.environ.get("XLA_FLAGS", "") for flag in _DETERMINISM_FLAGS)
    return Execution(backend="cudnn", plan={}, deterministic=None if asked else False)


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    sources: tuple[Source, ...],
    scale: float,
    plan: Plan | None = None,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `range_attention`; there is nothing to plan."""
    del plan
    (source,) = sources
    assert isinstance(source, TokenSource)
    own = queries if source.queries is None else source.queries
    window = source.window
    if window is not None and window >= own.shape[1]:
        window = None
    output, logsumexp = _attend(own, source.keys, source.values, scale, window)
    return output, jnp.swapaxes(logsumexp, 1, 2)


def _fused(
    queries: Array, keys: Array, values: Array, scale: float, window: int | None
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch heads rows"]]:
    output, logsumexp = cast(
        tuple[Array, Array],
        fused_attention_stablehlo.dot_product_attention(
            queries,
            keys,
            values,
            scale=scale,
            mask_type=fused_attention_stablehlo.MaskType.CAUSAL,
            sliding_window_length=window,  # counts the row's own token, as ours does
            return_residual=True,
        ),
    )
    return output, logsumexp


_attend = jax.custom_vjp(_fused, nondiff_argnums=(3, 4))


def _attend_forward(queries, keys, values, scale, window):
    queries, keys, values = (primal.value for primal in (queries, keys, values))
    fused = functools.partial(_fused, scale=scale, window=window)
    outputs, backward = jax.vjp(fused, queries, keys, values)
    return outputs, (backward, queries, keys, values, outputs)


def _attend_backward(scale, window, saved, gradients):
    backward, queries, keys, values, (output, logsumexp) = saved
    output_gradient, logsumexp_gradient = gradients
    if isinstance(output_gradient, SymbolicZero):
        output_gradient = jnp.zeros_like(output)
    if isinstance(logsumexp_gradient, SymbolicZero):
        return backward((output_gradient, jnp.zeros_like(logsumexp)))
    # cuDNN's backward takes no gradient of the logsumexp, and JAX's rule for it drops it
    logsumexp, logsumexp_gradient = (jnp.swapaxes(x, 1, 2) for x in (logsumexp, logsumexp_gradient))
    return xla.gradients(
        queries,
        TokenSource(keys, values, window=window),
        (output, logsumexp),
        (output_gradient, logsumexp_gradient),
        scale,
    )


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
