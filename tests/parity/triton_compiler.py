"""Compiles every Triton kernel for a GPU that is not there.

    python tests/parity/triton_compiler.py CAPABILITY KIBIBYTES HEAD_DIM

for a compute capability such as 80, whose programs may take KIBIBYTES of shared memory. Prints the
kernels' names. A process of its own, as Triton's interpreter replaces what it compiles.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from seqeff_kernels import CacheBlock, RangeSource, TokenSource, gpu, pack
from seqeff_kernels.decode_attention import triton as decoding
from seqeff_kernels.range_attention import triton as ranges
from seqeff_kernels.rotate_and_append import triton as appending


def main(capability: int, kibibytes: int, head_dim: int) -> set[str]:
    """Names of the kernels that were compiled.

    Raises:
      ValueError: one takes more shared memory than there is.
    """
    compiled = set()

    def triton_call(
        kernel: Any,
        inputs: Sequence[Array],
        outputs: Sequence[jax.ShapeDtypeStruct],
        *,
        grid: tuple[int, ...],
        num_warps: int,
        num_stages: int,
        aliases: dict[int, int] | None = None,
        **constants: Any,
    ) -> list[Array]:
        arrays = (*inputs, *outputs)
        made = gpu.compile_triton(kernel, arrays, num_warps, num_stages, constants, capability)
        taken = made.metadata.shared
        if taken > 1024 * kibibytes:
            raise ValueError(f"{kernel.__name__} takes {taken / 1024:.1f} KiB of {kibibytes}")
        compiled.add(kernel.__name__)
        return [jnp.zeros(output.shape, output.dtype) for output in outputs]

    for module in (gpu, decoding, appending):
        module.triton_call = triton_call
    gpu.triton_obstacle = lambda: None
    gpu.compute_capability = lambda: (capability // 10, capability % 10)
    gpu.shared_memory = lambda: 1024 * kibibytes

    heads, length = 2, 256
    tokens = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.bfloat16)

    def loss(queries: Array, keys: Array, values: Array) -> Array:
        packed = pack(jnp.arange(length)[None] % 8 == 0, length // 8)
        end = jnp.clip(packed.count - 64, 0)
        sources = (
            RangeSource(keys, values, jnp.zeros_like(end), end, packed=packed),
            TokenSource(keys, values, window=64),
        )
        output, logsumexp = ranges.attend(queries, sources, 0.1)
        return output.astype(jnp.float32).sum() + logsumexp.sum()

    jax.eval_shape(jax.grad(loss, (0, 1, 2)), tokens, tokens, tokens)
    for many in (1, 64):
        entries = jax.ShapeDtypeStruct((1, 4096, 1, head_dim), jnp.bfloat16)
        filled = jax.ShapeDtypeStruct((1,), jnp.int32)
        query = jax.ShapeDtypeStruct((1, 1, many, head_dim), jnp.bfloat16)
        block = CacheBlock(entries, entries, filled)
        jax.eval_shape(lambda *call: decoding.attend(*call, None, 0.1), query, (block,))
    joined = jax.ShapeDtypeStruct((1, 1, 3 * heads * head_dim), jnp.bfloat16)
    angles = jax.ShapeDtypeStruct((1, 1, head_dim // 2), jnp.float32)
    slot = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    jax.eval_shape(
        lambda *call: appending.rotate_and_append(*call, heads, False),
        *(joined, None, tokens, tokens, slot, (angles, angles)),
    )
    return compiled


if __name__ == "__main__":
    print(*sorted(main(*map(int, sys.argv[1:]))))
