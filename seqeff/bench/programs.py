"""Programs that are timed one after another, all compiled before: compiling disturbs the times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from seqeff_kernels.timing import compile_loop, loop_times

# at a time: XLA compiles outside of Python's lock
_COMPILING = 16


class Program:
    """Calls of a function on sets of arguments in turn; `compile_all` comes before `times`."""

    def __init__(
        self, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], iterations: int
    ) -> None:
        self.function, self.sets, self.iterations = function, sets, iterations
        self.loop: Future[jax.stages.Compiled] = Future()

    @functools.cached_property
    def times(self) -> list[float]:
        """Seconds of one call, once for every repeat; raises what compiling raised."""
        return loop_times(self.loop.result(timeout=0), self.sets, self.iterations)


def compile_all(programs: Iterable[Program]) -> None:
    """Returns when every program is compiled, or has failed to be."""
    with ThreadPoolExecutor(_COMPILING) as pool:
        for program in dict.fromkeys(programs):
            program.loop = pool.submit(
                compile_loop, program.function, program.sets, program.iterations
            )


def iterations_for(seconds: float, calls: int, *, of_call: float) -> int:
    """Iterations of `calls` calls, each of about `of_call` seconds, that take `seconds`."""
    return min(max(2, round(seconds / (of_call * calls))), 2_000)
