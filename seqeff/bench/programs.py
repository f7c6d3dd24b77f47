"""Programs that are timed one after another, all compiled before: compiling disturbs the times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from seqeff_kernels.timing import compile_loop, loop_time

# at a time: XLA compiles outside of Python's lock
_COMPILING = 16
_REPEATS = 5


class Program:
    """Calls of a function on sets of arguments in turn; `time_all` comes before `times`."""

    def __init__(
        self, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], iterations: int
    ) -> None:
        self.function, self.sets, self.iterations = function, sets, iterations
        self.loop: Future[jax.stages.Compiled] = Future()
        self._times: list[float] = []
        self._error: Exception | None = None

    @property
    def times(self) -> list[float]:
        """Seconds of one call, once for every repeat; raises what compiling or a run raised."""
        if self._error is not None:
            raise self._error
        return self._times[1:]

    def run(self) -> None:
        """Once more, unless it has failed; the first run warms up."""
        if self._error is not None:
            return
        try:
            loop = self.loop.result(timeout=0)
            self._times.append(loop_time(loop, self.sets, self.iterations))
        except Exception as error:  # one implementation must not end a benchmark
            self._error = error


def time_all(programs: Iterable[Program]) -> None:
    """Compiles all programs, and then runs them in turn: a clock that falls, falls for them all."""
    programs = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(_COMPILING) as pool:
        for program in programs:
            program.loop = pool.submit(
                compile_loop, program.function, program.sets, program.iterations
            )
    for _ in range(1 + _REPEATS):
        for program in programs:
            program.run()


def iterations_for(seconds: float, calls: int, *, of_call: float) -> int:
    """Iterations of `calls` calls, each of about `of_call` seconds, that take `seconds`."""
    return min(max(2, round(seconds / (of_call * calls))), 2_000)
