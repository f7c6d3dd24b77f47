"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Self, TextIO

import jax
from tqdm import tqdm

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"


class Progress:
    """Step, loss, tokens/s and time left; silent on processes other than 0.

    Args:
      steps: of the whole run.
      done: steps that a resumed run starts with.
      stream: None: standard error.
      interval: seconds between lines where the stream is no terminal.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        *,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._silent = jax.process_index() != 0
        self._steps, self._step = steps, done
        self._interval, self._clock = interval, clock
        self._printed = clock()
        # the first step compiles, so that time left follows from those after it
        self._start: tuple[int, float] | None = None
        self._bar = None
        if not self._silent and self._stream.isatty():
            self._bar = tqdm(
                total=steps, initial=done, file=self._stream, bar_format=_BAR, dynamic_ncols=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done."""
        if self._silent:
            return
        state = f"loss {loss:.4f}, {_thousands(tokens_per_second)} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        now = self._clock()
        if self._bar is None and (step == self._steps or now - self._printed >= self._interval):
            self._printed = now
            self._print(f"step {step}/{self._steps}, {state}{self._left(step, now)}")
        self._start = self._start or (step, now)

    def _left(self, step: int, now: float) -> str:
        """The time left, for a line; nothing as long as it is not known."""
        if step == self._steps:
            return ", 00:00 left"
        if self._start is None:
            return ""
        first, begin = self._start
        remaining = (now - begin) / max(step - first, 1) * (self._steps - step)
        return f", {tqdm.format_interval(remaining)} left"

    def write(self, text: str) -> None:
        """Prints text above the bar."""
        if self._silent:
            return
        if self._bar is None:
            self._print(text)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _thousands(value: float) -> str:
    return tqdm.format_sizeof(value) if value >= 1000 else f"{value:.0f}"
