"""Device time of JAX functions, without the host's."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_PILOT = 2
# of a loop, beside which the host's tenth of a millisecond to start it is nothing
_SECONDS = 0.1
_MOST_ITERATIONS = 10_000


def device_times(
    function: Callable[..., Any],
    sets: Sequence[tuple[Any, ...]],
    *,
    iterations: int | None = None,
    repeats: int = 5,
    alone: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[float]:
    """Seconds that one call of `function` takes on the device, once for every repeat.

    Each repeat runs one jitted loop, whose every iteration calls the function on all sets of
    arguments in turn. Together the sets should exceed the device's cache several times over.

    Args:
      function: from arrays, or pytrees of them, to a pytree of arrays.
      sets: of positional arguments, all of the same shapes.
      iterations: of the loop; None: enough that it takes a tenth of a second.
      repeats: of the loop, after one to warm up.
      alone: makes what is held while loops run, but not while they compile: a lock, where several
        processes use the device.
    """
    sets = list(sets)
    if iterations is None:
        loop = compile_loop(function, sets, _PILOT)
        with alone():
            (seconds,) = loop_times(loop, sets, _PILOT, repeats=1)
        enough = math.ceil(_SECONDS / (seconds * len(sets)))
        iterations = min(max(_PILOT, enough), _MOST_ITERATIONS)
        if iterations != _PILOT:
            loop = compile_loop(function, sets, iterations)
    else:
        loop = compile_loop(function, sets, iterations)
    with alone():
        return loop_times(loop, sets, iterations, repeats)


def compile_loop(
    function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], iterations: int
) -> jax.stages.Compiled:
    """A program that calls the function on every set, `iterations` times over.

    Nothing is left out or done once for all iterations. A token goes through every barrier and
    out of the loop: a barrier with an operand that nothing uses is cut down by XLA, and ties
    nothing any more. The loop carries the outputs, so that no kernel has to read them; its length
    is static, as the host would otherwise decide after each iteration whether another follows.
    """

    def loop(sets: list[tuple[Any, ...]]) -> tuple[list[Any], Any]:
        def step(_: Any, carry: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
            token = carry[1]
            outputs = []
            for arguments in sets:
                held, token = lax.optimization_barrier((arguments, token))
                output, token = lax.optimization_barrier((function(*held), token))
                outputs.append(output)
            return outputs, token

        empty = jax.tree.map(
            lambda output: jnp.zeros(output.shape, output.dtype),
            [jax.eval_shape(function, *arguments) for arguments in sets],
        )
        return lax.fori_loop(0, iterations, step, (empty, jnp.float32(0)))

    return jax.jit(loop).lower(list(sets)).compile()


def loop_times(
    loop: jax.stages.Compiled,
    sets: Sequence[tuple[Any, ...]],
    iterations: int,
    repeats: int = 5,
) -> list[float]:
    """Seconds of one call in a loop of `compile_loop`, once for every repeat after a warm-up."""
    return [loop_time(loop, sets, iterations) for _ in range(repeats + 1)][1:]


def loop_time(loop: jax.stages.Compiled, sets: Sequence[tuple[Any, ...]], iterations: int) -> float:
    """Seconds of one call in a loop of `compile_loop`."""
    sets = list(sets)
    begin = time.perf_counter()
    jax.block_until_ready(loop(sets))
    return (time.perf_counter() - begin) / (iterations * len(sets))
