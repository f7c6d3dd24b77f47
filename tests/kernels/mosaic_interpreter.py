"""Mosaic kernels on the CPU: JAX's interpreter, with what it lacks in plain JAX."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax.numpy as jnp
import pytest
from jax import lax

from seqeff_kernels import gpu


def _times_transposed(left, right, meanwhile=lambda: None):
    product = jnp.dot(left[...].astype(jnp.float32), right[...].astype(jnp.float32).T)
    meanwhile()
    return product


def _add_product(total, left, right):
    return total + jnp.dot(left.astype(jnp.float32), right[...].astype(jnp.float32))


@contextlib.contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the kernels without the tensor cores' products and without register layouts."""
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
    }
    for name, replacement in replacements.items():
        assert hasattr(pieces, name)
        for module in (pieces, rows, forward, gradients):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    # few, so that a program takes several items
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 3)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield
