"""Mosaic kernels on the CPU: lowered for Hopper, and in JAX's interpreter, what it lacks in JAX."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from seqeff_kernels import gpu

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Mosaic kernels need jax 0.11 or newer"
)
_HOPPER = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
    """The module that Hopper is given for a call, of arrays or their shapes."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_HOPPER)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def _times_transposed(left, right, meanwhile=lambda: None):
    product = jnp.dot(left[...].astype(jnp.float32), right[...].astype(jnp.float32).T)
    _order_reads()
    meanwhile()
    return product


def _add_product(total, left, right):
    total = total + jnp.dot(left.astype(jnp.float32), right[...].astype(jnp.float32))
    _order_reads()
    return total


def _order_reads():
    """Orders plain reads before later copies, as the tensor cores' own reads are."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.commit_smem()


def shared_memory(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of shared memory that the first kernel of a call takes."""
    from jax.experimental.mosaic.gpu import core

    with core.artificial_shared_memory_limit(0), pytest.raises(ValueError, match="smem") as refused:
        lowered(function, *arguments)
    found = re.search(r"smem_bytes=(\d+)", str(refused.value))
    assert found
    return int(found[1])


@contextlib.contextmanager
def interpreted(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 3, detect_races: bool = True
) -> Iterator[None]:
    """Runs the kernels without the tensor cores' products and without register layouts.

    Of few multiprocessors, each takes several items of work. Raises AssertionError at the end if
    a kernel raced, or if none ran.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from seqeff_kernels.range_attention.mosaic import forward, gradients, pieces, rows

    replacements = {
        "times_transposed": _times_transposed,
        "add_product": _add_product,
        "load_tile": lambda ref: ref[...],
        "load_rows": lambda ref: ref[...],
        "load_columns": lambda ref: ref[...],
        "filled": functools.partial(jnp.full, dtype=jnp.float32),
        "indices": lambda shape, axis: lax.broadcasted_iota(jnp.int32, shape, axis),
        "shared_memory": plgpu.SMEM,
        "one_place": lambda *buffers: buffers,
    }
    for name, replacement in replacements.items():
        assert hasattr(pieces, name)
        for module in (pieces, rows, forward, gradients):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr(gpu, "multiprocessors", lambda: multiprocessors)
    # one a kernel, of which the interpreter keeps the last
    detectors = []
    make_detector = gpu_callbacks.GPURaceDetectionState

    def kept_detector(**sizes):
        detectors.append(make_detector(**sizes))
        return detectors[-1]

    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", kept_detector)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        yield
        jax.effects_barrier()
    assert detectors, "no kernel was interpreted"
    races = sum(detector.races_found for detector in detectors)
    assert not races, f"{races} kernels race: see RACE DETECTED in what they print"
