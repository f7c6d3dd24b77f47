"""Records some steps of a run with JAX's profiler."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Self

import jax

from seqeff.checks import UserError, writing


class Profiler:
    """Records steps; a context manager, which ends a recording that the run's end cuts short.

    Args:
      window: first step and number of steps; None: nothing is recorded.
      directory: gets the recording, for TensorBoard or XProf.
    """

    def __init__(self, window: tuple[int, int] | None, directory: Path) -> None:
        self._first, count = window or (-1, 0)
        self._end = self._first + count
        self._directory = directory
        self._recording = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._stop()
        except UserError:
            if kind is None:
                raise

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the recording once `state`, that of all earlier steps, is computed.

        Raises:
          UserError: the disk is full or not writable.
        """
        if step == self._first:
            jax.block_until_ready(state)
            with self._writing():
                # the profiler itself first writes when it stops
                self._directory.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(self._directory)
            self._recording = True
        elif step == self._end:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        recording, self._recording = self._recording, False
        if recording:
            with self._writing():
                jax.profiler.stop_trace()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(f"the profile to {self._directory}")
