"""What the default device is, and how a Triton kernel is called on it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array

TESTED_JAX = "0.11.2"
TESTED_TRITON = "3.6"

_TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
_LANES = 32
# bytes that every array of XLA's is aligned to, which lets Triton read vectors
_ALIGNED = 16


def compute_capability() -> tuple[int, int] | None:
    """Of the default device; None where it is not an NVIDIA GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def multiprocessors() -> int:
    """Of the default device; those of an H200 where it is not a GPU."""
    return getattr(jax.devices()[0], "core_count", 132)


def shared_memory() -> int:
    """Bytes that a program of the default device may take; Hopper's where it is not a GPU."""
    return getattr(jax.devices()[0], "shared_memory_per_block_optin", 227 * 1024)


def partition_obstacle() -> str | None:
    """Why a kernel cannot serve arrays that XLA splits over the mesh in use, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names):
        return None
    return f"XLA cannot split it over a mesh of {mesh.size} devices; call it under jax.shard_map"


def covered(backend: Any, queries: Array) -> bool:
    """Whether the GPU checks cover this jax and the queries' sizes on the default device.

    Args:
      backend: a module that lists what has passed, as TESTED and TESTED_CAPABILITIES.
    """
    if jax.__version__ != TESTED_JAX:
        return False
    size = queries.shape[-1], str(queries.dtype)
    return size in backend.TESTED and compute_capability() in backend.TESTED_CAPABILITIES


def say_taken(taken: str, passed_over: Sequence[str], queries: Array) -> str:
    """What `auto` takes; where that is the portable form, why not one of kernels that could serve.

    Args:
      passed_over: names of those kernels, which no check on such a device covers.
    """
    if taken != "xla" or not passed_over:
        return f"takes {taken}"
    if jax.__version__ != TESTED_JAX:
        why = f"are of jax {TESTED_JAX}, not {jax.__version__}; pip install 'seqeff[gpu]' brings it"
    else:
        major, minor = compute_capability() or (0, 0)
        why = (
            f"do not cover head_dim {queries.shape[-1]} in {queries.dtype} on compute capability "
            f"{major}.{minor}"
        )
    return f"takes xla: {' and '.join(passed_over)} could serve, but the GPU checks {why}"


def triton_obstacle() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    capability = compute_capability()
    if capability is None:
        return f"it needs a CUDA device; the default backend is {jax.default_backend()}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return partition_obstacle() or _missing_package()


@functools.cache
def _missing_package() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'seqeff[gpu]' brings the tested version"
    found = importlib.metadata.version("triton")
    if not found.startswith(TESTED_TRITON + "."):
        return f"it is tested with triton {TESTED_TRITON}, not {found}"
    return None


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
    """Runs a `triton.jit` kernel, whose parameters are inputs, outputs and constants, in order.

    XLA may record the call in a CUDA graph, with the kernels before and after it.

    Args:
      aliases: input to output: the output begins as the input's contents, in its memory.
    """
    from jaxlib import gpu_triton

    major, minor = compute_capability() or (0, 0)
    capability, arrays = 10 * major + minor, (*inputs, *outputs)
    compiled = compile_triton(kernel, arrays, num_warps, num_stages, constants, capability)
    program = gpu_triton.TritonKernel(
        compiled.metadata.name,
        num_warps,
        1,
        compiled.metadata.shared,
        compiled.asm["ptx"],
        compiled.asm["ttir"],
        capability,
    )
    pointers = [gpu_triton.create_array_parameter(0, _ALIGNED) for _ in arrays]
    x, y, z = (*grid, 1, 1)[:3]
    launch = gpu_triton.TritonKernelCall(program, x, y, z, pointers)
    call = jax.ffi.ffi_call(
        "triton_kernel_call_ffi", list(outputs), input_output_aliases=aliases or {}
    )
    return list(call(*inputs, opaque=zlib.compress(launch.to_proto(kernel.__name__, b""))))


def compile_triton(
    kernel: Any,
    arrays: Sequence[Array | jax.ShapeDtypeStruct],
    num_warps: int,
    num_stages: int,
    constants: Mapping[str, Any],
    capability: int,
) -> Any:
    """The `triton.compiler.CompiledKernel` of a kernel for a compute capability such as 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = [f"*{_TRITON_TYPES[str(array.dtype)]}" for array in arrays]
    source = ASTSource(
        kernel,
        signature=dict(zip(kernel.arg_names, types, strict=False))
        | dict.fromkeys(constants, "constexpr"),
        constexprs=dict(constants),
        attrs={(place,): [["tt.divisibility", _ALIGNED]] for place in range(len(arrays))},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, _LANES), options=options)
