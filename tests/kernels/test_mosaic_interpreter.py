"""What runs the Mosaic kernels on the CPU sees their races."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted, needs_mosaic


def copy_through_shared_memory(array, waits):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(source, target, smem, barrier):
        plgpu.copy_gmem_to_smem(source, smem, barrier)
        if waits:
            plgpu.barrier_wait(barrier)
        target[...] = smem[...]

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(array.shape, array.dtype),
        scratch_types=[plgpu.SMEM(array.shape, array.dtype), plgpu.Barrier()],
    )(array)


@needs_mosaic
def test_a_read_after_the_copy_does_not_race(monkeypatch):
    with interpreted(monkeypatch):
        copied = copy_through_shared_memory(jnp.arange(128.0), waits=True)
    np.testing.assert_array_equal(copied, np.arange(128.0))


@needs_mosaic
@pytest.mark.parametrize("after", [0, 1])
def test_a_read_that_does_not_wait_for_the_copy_races(after, monkeypatch):
    with pytest.raises(AssertionError, match="1 kernels race"), interpreted(monkeypatch):
        copy_through_shared_memory(jnp.arange(128.0), waits=False)
        # the race is not forgotten over a kernel without one
        for _ in range(after):
            copy_through_shared_memory(jnp.arange(128.0), waits=True)


@needs_mosaic
def test_nothing_to_interpret_is_an_error(monkeypatch):
    with pytest.raises(AssertionError, match="no kernel"), interpreted(monkeypatch):
        pass
