"""Attention kernels on a GPU against the float32 reference, values and gradients.

    python experiments/gpu_checks/attention.py --json experiments/gpu_checks/RESULT.json

Needs one NVIDIA GPU. Exits with status 1 if a check fails. Backends that cannot serve here are
named with the reason. Checks are divided among processes, which compile at the same time. Without
a GPU, `--backend xla --repeats 2` runs the portable form on every case.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import DECODE_CASES, RANGE_CASES, DecodeCase, RangeCase
from jax import Array

import seqeff_kernels
from seqeff.runs import versions

_TOLERANCE = 1e-2  # relative, of bfloat16 and float16 operands
_REPEATS = 100
_CASES = (*RANGE_CASES, *DECODE_CASES)


def check(case: RangeCase | DecodeCase, repeats: int) -> dict[str, Any]:
    """Relative errors of all that a call gives; `repeats` runs are compared bit for bit."""
    inputs = case.inputs()
    obstacle = case.explain(inputs)
    if obstacle != "available":
        return {**case.describe(), "passed": None, "obstacle": obstacle}
    arrays, restore = _distinct(inputs)
    wide = [x.astype(jnp.float32) if x.dtype == case.dtype else x for x in arrays]
    exact = jax.jit(lambda x: case.run("reference", x, restore))(wide)
    kernel = jax.jit(lambda x: case.run(case.backend, x, restore)).lower(arrays).compile()
    jax.block_until_ready(exact)
    _spoil_free_memory()
    found = kernel(arrays)
    errors = [_error(a, b) for a, b in zip(found, exact, strict=True)]
    if case.backend == "cudnn":
        repeats = 1  # its backward adds in an order that changes
    same = all(
        bool(jnp.array_equal(a, b, equal_nan=True))
        for _ in range(repeats - 1)
        for a, b in zip(found, kernel(arrays), strict=True)
    )
    return {
        **case.describe(),
        "relative_errors": [float(f"{error:.2g}") for error in errors],
        "runs_with_the_same_bits": repeats if same else 0,
        "passed": same and max(errors) < _TOLERANCE,
    }


def kernels_hash() -> str:
    """SHA-256 of the kernel package's Python sources: their paths, sorted, and what they hold."""
    folder = Path(seqeff_kernels.__file__).parent
    found = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")):
        content = (folder / name).read_bytes()
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _distinct(inputs: Any) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
    """The arrays of the inputs, each once, and what makes inputs of as many arrays.

    Sources that share keys and values thus share them under `jit` and `grad` too, as in a model:
    kernels then add up their gradients in place.
    """
    leaves, tree = jax.tree.flatten(inputs)
    distinct = {id(leaf): leaf for leaf in leaves}
    places = [list(distinct).index(id(leaf)) for leaf in leaves]
    return (
        [jnp.asarray(leaf) for leaf in distinct.values()],
        lambda arrays: tree.unflatten([arrays[place] for place in places]),
    )


def _spoil_free_memory() -> None:
    """Leaves NaN in memory that is free, where a kernel finds what it forgets to write."""
    jax.block_until_ready(jnp.full(1 << 27, jnp.nan, jnp.bfloat16))


def _error(found: Array, exact: Array) -> float:
    """Relative, in the Euclidean norm; infinite where one is -inf or NaN and the other is not."""
    got, want = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)) or np.any(got[~finite] != want[~finite]):
        return float("inf")
    scale = np.linalg.norm(want[finite])
    return float(np.linalg.norm(got[finite] - want[finite]) / (scale or 1.0))


def _run(number: int, backend: str | None, repeats: int) -> dict[str, Any]:
    """One check; a failure of any kind is a result."""
    case = _CASES[number] if backend is None else _CASES[number].on(backend)
    try:
        return check(case, repeats)
    except Exception as error:  # the other checks are worth having
        return {**case.describe(), "error": f"{type(error).__name__}: {error}", "passed": False}


def _run_part(numbers: Sequence[int], settings: Sequence[str]) -> list[dict[str, Any]]:
    """Checks in a process of their own, which a crash of one ends."""
    call = [sys.executable, __file__, *settings, "--checks", *map(str, numbers)]
    # else each process takes most of the memory for itself
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lost = len(numbers) - len(found)
    if lost:
        found.append({"error": f"{lost} checks lost: {done.stderr[-1000:]}", "passed": False})
    for result in found:
        print(json.dumps(result), flush=True)
    return found


def main() -> int:
    """Runs all checks, divided among processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--operation", choices=("range", "decode"), help="(default: both)")
    parser.add_argument(
        "--backend", choices=("xla", "mosaic", "triton"), help="in place of each case's own"
    )
    parser.add_argument("--repeats", type=int, default=_REPEATS, help="compared bit for bit")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--checks", type=int, nargs="+", help="by number, in this process")
    parser.add_argument("--hash", action="store_true", help="prints the kernels' hash alone")
    options = parser.parse_args()
    if options.hash:
        print(kernels_hash())
        return 0
    if options.checks:
        for number in options.checks:
            print(json.dumps(_run(number, options.backend, options.repeats)), flush=True)
        return 0
    numbers = {
        None: range(len(_CASES)),
        "range": range(len(RANGE_CASES)),
        "decode": range(len(RANGE_CASES), len(_CASES)),
    }[options.operation]
    settings = ["--repeats", str(options.repeats)]
    settings += ["--backend", options.backend] if options.backend else []
    parts = [numbers[part :: options.processes] for part in range(options.processes)]
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        found = pool.map(lambda part: _run_part(part, settings), filter(len, parts))
        results = [result for part in found for result in part]
    results.sort(key=lambda result: json.dumps([str(result.get(k)) for k in ("backend", "case")]))
    report = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "kernels_sha256": kernels_hash(),
        "results": results,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [result for result in results if result["passed"] is False]
    unserved = sum(result["passed"] is None for result in results)
    passed = len(results) - len(failed) - unserved
    print(f"{passed} passed, {len(failed)} failed, {unserved} not served")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
