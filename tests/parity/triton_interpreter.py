"""Triton kernels on the CPU: `triton_call` under Triton's interpreter, from jitted JAX or not."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

# read where a kernel is decorated, Triton's own among them
os.environ["TRITON_INTERPRET"] = "1"
assert "triton" not in sys.modules, "triton was imported before triton_interpreter"


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
    """As `seqeff_kernels.gpu.triton_call`; what the kernel leaves unwritten is NaN."""
    import torch

    def run(*arrays):
        arguments = [torch.from_numpy(np.array(array)) for array in arrays]
        for output in outputs:
            floating = np.issubdtype(output.dtype, np.floating)
            unwritten = np.full(output.shape, np.nan if floating else -1, output.dtype)
            arguments.append(torch.from_numpy(unwritten))
        for source, target in (aliases or {}).items():
            arguments[len(arrays) + target] = arguments[source]
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
        return [argument.numpy() for argument in arguments[len(arrays) :]]

    for array in (*inputs, *outputs):
        # a bfloat16 dot is silently wrong in the interpreter
        assert array.dtype != jax.numpy.bfloat16, "the interpreter cannot do bfloat16"
    return jax.pure_callback(run, list(outputs), *inputs)
