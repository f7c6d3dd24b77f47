"""How tuning measures candidates: in processes that a failing one cannot spoil, with a journal."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from seqeff_kernels.candidates import Step

# takes a plan and the name of a pass, and gives seconds
Timer = Callable[[Any, str], float]
# seconds between looks at a process
_LOOK = 0.2


class Skipped(Exception):
    """A candidate has no time: it failed, in this process or an earlier one of the task."""


class Journal:
    """A file of what a task's processes did, which outlives each of them.

    It has a line of JSON for each event: a candidate `begun`, one `ended` with its `seconds` or the
    `reason` why it has none, and whether the process `waits` for the device.

    Args:
      lock: a file whose lock is held while the device is used; None: nobody else uses it.
    """

    def __init__(self, path: Path, lock: Path | None = None) -> None:
        self._path, self._lock = path, lock

    def ended(self) -> dict[str, dict[str, Any]]:
        """The lines of the candidates that ended."""
        return {line["ended"]: line for line in self._lines() if "ended" in line}

    def begun(self) -> str | None:
        """The candidate that was begun last, if it has not ended."""
        candidate = None
        for line in self._lines():
            candidate = line.get("begun", None if "ended" in line else candidate)
        return candidate

    def waits(self) -> bool:
        """Whether the last event is that the process waits for the device."""
        return self._lines()[-1:] == [{"waits": True}]

    def size(self) -> int:
        """Bytes, which every event adds to."""
        return self._path.stat().st_size

    def skip(self, candidate: str, reason: str) -> None:
        """Ends a candidate without a time."""
        self._write(ended=candidate, reason=reason)

    def timed(self, name: str, timer: Timer) -> Timer:
        """A timer that knows the times of candidates that ended, and writes down the others.

        Args:
          name: of what the plans are for, which tells them from others in this file.

        Raises, when called:
          Skipped: the candidate is one that failed.
          SystemExit: it left the device unusable; it stays as one that was begun.
        """

        def known(plan: Any, timed: str) -> float:
            candidate = f"{name} {timed} {plan}"
            ended: dict[str, Any] | None = self.ended().get(candidate)
            if ended is None:
                self._write(begun=candidate)
                try:
                    ended = {"seconds": timer(plan, timed)}
                except Exception as error:  # a compiler's refusals are of any kind
                    ended = {"reason": _reason(error)}
                    if not self._device_works():
                        raise SystemExit(f"the device is unusable: {ended['reason']}") from error
                self._write(ended=candidate, **ended)
            if "reason" in ended:
                raise Skipped(ended["reason"])
            return ended["seconds"]

        return known

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock, so that one process at a time uses the device."""
        if self._lock is None:
            yield
            return
        with open(self._lock) as file:
            self._write(waits=True)
            fcntl.flock(file, fcntl.LOCK_EX)
            self._write(waits=False)
            yield

    def _device_works(self) -> bool:
        """Whether the device still computes: after some faults, nothing does in that process."""
        try:
            with self.alone():
                jax.block_until_ready(jnp.zeros(8) + 1)
        except Exception:
            return False
        return True

    def _write(self, **event: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        # the last one may be half written
        whole = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in whole]


def search(start: Any, steps: Sequence[Step], timer: Timer) -> tuple[Any, dict[str, float]] | None:
    """The best plan, and the seconds of each pass with it, or None where no candidate works.

    A step of which no candidate works leaves the plan as it is.

    Args:
      start: the plan to change; it is a candidate of every step.
      steps: done in turn, each from the best plan of the one before.
    """
    plan, times = start, {}
    for step in steps:
        candidates = dict.fromkeys(
            [plan, *(dataclasses.replace(plan, **change) for change in step.changes)]
        )
        found = {}
        for candidate in candidates:
            try:
                found[candidate] = timer(candidate, step.timed)
            except Exception as error:  # a compiler's refusals are of any kind
                print(f"  skipped  {candidate}: {_reason(error)}", flush=True)
                continue
            print(f"  {1e3 * found[candidate]:8.4f} ms {step.timed:8} {candidate}", flush=True)
        if found:
            plan = min(found, key=lambda candidate: found[candidate])
            times[step.timed] = found[plan]
    return (plan, times) if times else None


def run_task(call: Sequence[str], journal: Journal, timeout: float) -> bool:
    """Runs a task's process, and again without the candidate that ended it; whether it succeeds."""
    while True:
        status, output, errors = _run_process(call, journal, timeout)
        if status == 0:
            print(output, end="", flush=True)
            return True
        if status is None:
            reason = f"no progress in {timeout:g} s"
        else:
            ended = f"signal {-status}" if status < 0 else f"status {status}"
            reason = f"its process ended with {ended}"
        candidate = journal.begun()
        if candidate is None or status == -signal.SIGINT:
            print(f"{output}  failed: {reason}\n{errors[-2000:]}", flush=True)
            return False
        last = errors.strip().rpartition("\n")[2][:160]
        journal.skip(candidate, f"{reason}: {last}" if last else reason)


def _run_process(
    call: Sequence[str], journal: Journal, timeout: float
) -> tuple[int | None, str, str]:
    """Exit status, output and errors of a process; the status is None where it was ended.

    Args:
      timeout: seconds without an event in the journal after which it is, unless it waits for the
        device.
    """
    # files: what a process leaves running could hold pipes open
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(call, stdout=output, stderr=errors) as process,
    ):
        size, since, status = journal.size(), time.monotonic(), None
        while status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(_LOOK)
            if size != journal.size() or journal.waits():
                size, since = journal.size(), time.monotonic()
            if time.monotonic() - since > timeout:
                break
        process.kill()
        process.wait()
        output.seek(0)
        errors.seek(0)
        return status, output.read(), errors.read()


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:160]
    return text if isinstance(error, Skipped) else f"{type(error).__name__}: {text}"
