"""What benchmarks share: the device they need, failures told in one line, and their file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from seqeff.checks import UserError, writing
from seqeff.runs import versions, write_atomically
from seqeff_kernels import gpu


def require_gpu(benchmark: str) -> dict[str, Any]:
    """The default device, in words; a `UserError` where it is not an NVIDIA GPU."""
    remedy = "it needs an NVIDIA GPU and jax with CUDA: pip install 'seqeff[gpu]'"
    try:
        capability = gpu.compute_capability()
    except (RuntimeError, AssertionError) as error:  # what jax raises where no device is found
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"bench {benchmark} finds no device ({reason}); {remedy}") from error
    if capability is None:
        raise UserError(
            f"bench {benchmark} finds no GPU: the default backend is {jax.default_backend()}; "
            + remedy
        )
    return {
        "kind": jax.devices()[0].device_kind,
        "compute_capability": f"{capability[0]}.{capability[1]}",
    }


def prepare_rivals() -> None:
    """Leaves some of the device's memory to a second framework; before JAX starts its backends."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def random_vocabulary(size: int) -> list[str]:
    """Texts for ids without any: 11.52% are separators, the Pile's share in SepLLM's paper."""
    return ["." if index * 72 % 625 < 72 else "a" for index in range(size)]


def chosen_shapes(
    names: Sequence[str], shapes: dict[str, Any], default: Sequence[str]
) -> list[str]:
    """The names, or the default ones; a `UserError` that lists all where one is unknown."""
    for name in names:
        if name not in shapes:
            raise UserError(f"no shape is called {name}; choose among {', '.join(shapes)}")
    return list(dict.fromkeys(names or default))


def write_report(
    file: Path | None,
    benchmark: str,
    results: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any] = MappingProxyType({}),
    commit: str | None = None,
) -> None:
    """Writes `results` and what they were measured with to a file, if there is one.

    Args:
      facts: further members of the report.
      commit: stands for what git says.
    """
    if file is None:
        return
    found = versions() | ({"commit": commit} if commit else {})
    report = {"benchmark": benchmark, "versions": found, **facts, "results": results}
    with writing(str(file), "or choose another --json"):
        write_atomically(file, json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that are not finite, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(member) for key, member in value.items()}
    return [*map(_finite, value)] if isinstance(value, (list, tuple)) else value


def attempt(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `measure` returns, or why it fails: one implementation must not end a benchmark."""
    try:
        return measure(*arguments)
    except Exception as error:
        return {"error": first_line(error)}


def label(row: Mapping[str, Any]) -> str:
    """An implementation as tables name it: `auto` with the backend that it took."""
    name = row["implementation"]
    return f"auto: {row['backend']}" if name == "auto" else name


def first_line(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
