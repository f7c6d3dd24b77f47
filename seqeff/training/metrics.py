"""Metrics of a run: a JSONL file that survives any interruption, speed, and memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from seqeff.checks import UserError, writing

# dense bfloat16 FLOP/s from the vendors' data sheets; the first name found in the device's kind
_PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Device(Protocol):
    """What is asked of a `jax.Device`."""

    @property
    def device_kind(self) -> str: ...

    def memory_stats(self) -> dict[str, Any] | None: ...


class MetricsFile:
    """Appends one JSON object a line, each on the disk's side of the process when `write` returns.

    Numbers that are not finite, which JSON lacks, are the strings "NaN", "Infinity", "-Infinity".
    Only process 0 writes. A line cut off by a killed process is removed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stream = None
        if jax.process_index() == 0:
            with self._writing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self.path.open("ab", buffering=0)
                whole = self.path.read_bytes().rfind(b"\n") + 1
                os.truncate(self.path, whole)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a line for a step; array scalars become numbers.

        Raises:
          UserError: the disk is full or not writable.
        """
        if self._stream is None:
            return
        values = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        with self._writing():
            # a disk that fills up takes a part, and refuses the rest
            while line:
                line = line[self._stream.write(line) :]

    def truncate_after(self, step: int) -> None:
        """Removes the lines past a step, all at once, when a run resumes from there.

        Raises:
          UserError: a line is damaged, or the disk is full or not writable.
        """
        if self._stream is None:
            return
        lines = _parsed(self.path, self.path.read_bytes())
        kept = b"".join(line for line, values in lines if values["step"] <= step)
        with self._writing():
            self._stream.close()
            partial = self.path.with_name(self.path.name + ".partial")
            with partial.open("wb") as stream:
                stream.write(kept)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self.path)
            self._stream = self.path.open("ab", buffering=0)

    def close(self) -> None:
        if self._stream is not None:
            with self._writing():
                self._stream.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(f"metrics to {self.path}")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without one that is still being written.

    Raises:
      UserError: there is no such file, or a line of it is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read metrics from {path}: {error.strerror}") from error
    return [
        {
            name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
            for name, value in values.items()
        }
        for _, values in _parsed(path, content)
    ]


def _parsed(path: str | Path, content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line, with its line break, and the values in it."""
    *lines, _ = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not (isinstance(values, dict) and isinstance(values.get("step"), int)):
            raise UserError(f"{path}, line {number}: no metrics of a step; remove this line")
        yield line + b"\n", values


class Throughput:
    """Tokens a second over the last updates, without the time spent inside `pause()`."""

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._paused = 0.0
        self._tokens = 0
        self._points = deque([(self._now(), 0)], maxlen=window + 1)

    def update(self, tokens: int) -> None:
        """Counts tokens whose step has ended."""
        self._tokens += tokens
        self._points.append((self._now(), self._tokens))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count: evaluation, checkpoints."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def tokens_per_second(self) -> float:
        """0 before the first update."""
        (first, before), (last, after) = self._points[0], self._points[-1]
        return (after - before) / (last - first) if last > first else 0.0

    def _now(self) -> float:
        return self._clock() - self._paused


def peak_flops(device: Device) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None when not known."""
    kind = device.device_kind.lower()
    return next((peak for name, peak in _PEAK_FLOPS if name.lower() in kind), None)


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, devices: int, device: Device
) -> float | None:
    """Share of the devices' peak that the model's own FLOPs take (PaLM, 2204.02311, appendix B).

    Args:
      tokens_per_second: of all devices together.
      flops_per_token: forward and backward, without rematerialisation.
      device: one of them, all alike.

    Returns:
      None when the device's peak is not known.
    """
    peak = peak_flops(device)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * devices)


def device_memory(device: Device) -> dict[str, float]:
    """GiB in use now and at most so far on a device; empty when it does not say."""
    statistics = device.memory_stats() or {}
    names = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
    return {name: statistics[key] / 2**30 for name, key in names.items() if key in statistics}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return next(
            name for name, special in _NOT_FINITE.items() if value == special or math.isnan(value)
        )
    return value
