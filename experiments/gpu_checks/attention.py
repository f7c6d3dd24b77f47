"""The kernels on a GPU against the float32 reference, values and gradients.

    python experiments/gpu_checks/attention.py --json experiments/gpu_checks/RESULT.json

Needs one NVIDIA GPU. Exits with status 1 if a check fails. Backends that cannot serve here are
named with the reason. Checks are divided among processes, which compile at the same time, and with
`--part` among GPUs; `--join` makes one report of theirs. Without a GPU, `--backend xla --repeats 2`
runs the portable form on every case; `--short` leaves out the long ones, which take it minutes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from append_cases import APPEND_CASES, AppendCase
from decode_cases import DECODE_CASES, DecodeCase
from jax import Array
from range_cases import RANGE_CASES, RangeCase

import seqeff_kernels
from seqeff.runs import versions

# relative errors: of all of a result, and of any of its rows
_TOLERANCE = 1e-2
_ROW_TOLERANCES = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-2}
# of the portable form's error in a row, where that exceeds the tolerance
_MARGIN = 1.5
_REPEATS = 100
Case = RangeCase | DecodeCase | AppendCase
_CASES: tuple[Case, ...] = (*RANGE_CASES, *DECODE_CASES, *APPEND_CASES)
_KINDS = {"range": RangeCase, "decode": DecodeCase, "append": AppendCase}


def check(case: Case, repeats: int) -> dict[str, Any]:
    """Relative errors of all that a call gives, and whether its bits stay when they have to."""
    inputs: Any = case.inputs()
    obstacle = case.explain(inputs)
    if obstacle != "available":
        return {**case.describe(), "passed": None, "obstacle": obstacle}
    arrays, restore = _distinct(inputs)
    wide = [x.astype(jnp.float32) if x.dtype == case.dtype else x for x in arrays]
    # the reference takes memory of rows x entries
    oracle = "xla" if case.is_long else "reference"
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda x: case.run(oracle, x, restore))(wide)
    kernel = jax.jit(lambda x: case.run(case.backend, x, restore)).lower(arrays).compile()
    exact = [np.asarray(x) for x in exact]
    _spoil_free_memory()
    found = kernel(arrays)
    errors, row_errors = zip(*map(_errors, found, exact), strict=True)
    steady = slice(case.deterministic)
    # waiting for each run would leave the device to the other processes meanwhile
    unchanged = [_same_bits(found[steady], kernel(arrays)[steady]) for _ in range(repeats - 1)]
    again = all(map(bool, unchanged))
    mates = _ignores_batch_mates(kernel, arrays, found, steady)
    later = _ignores_later_tokens(kernel, case, inputs, found)
    allowed = [_ROW_TOLERANCES[case.dtype]] * len(found)
    if any(a >= b for a, b in zip(row_errors, allowed, strict=True)):
        # a row whose sum cancels is as far in any form of this dtype
        portable = jax.jit(lambda x: case.run("xla", x, restore))(arrays)
        usual = [_errors(*pair)[1] for pair in zip(portable, exact, strict=True)]
        allowed = [max(a, _MARGIN * b) for a, b in zip(allowed, usual, strict=True)]
    close = max(errors) < _TOLERANCE
    close &= all(a < b for a, b in zip(row_errors, allowed, strict=True))
    return {
        **case.describe(),
        "relative_errors": [float(f"{error:.2g}") for error in errors],
        "greatest_row_errors": [float(f"{error:.2g}") for error in row_errors],
        "allowed_row_errors": [float(f"{error:.2g}") for error in allowed],
        "runs_with_the_same_bits": repeats if again else 0,
        "same_bits_with_other_batch_mates": mates,
        "same_bits_with_other_later_tokens": later,
        "passed": close and again and mates is not False and later is not False,
    }


@jax.jit
def _same_bits(first: Sequence[Array], second: Sequence[Array]) -> Array:
    pairs = zip(first, second, strict=True)
    return jnp.array([jnp.array_equal(a, b, equal_nan=True) for a, b in pairs]).all()


def kernels_hash() -> str:
    """SHA-256 of the kernel package's sources and tables: sorted paths, and what they hold."""
    folder = Path(seqeff_kernels.__file__).parent
    found = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in _sources(folder)):
        content = (folder / name).read_bytes()
        found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _sources(folder: Path) -> list[Path]:
    return [*folder.rglob("*.py"), *folder.rglob("*.json")]


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


def _errors(found: Array, exact: np.ndarray) -> tuple[float, float]:
    """Relative, in the Euclidean norm: of all, and the greatest of a row, which is a head's vector.

    A row's error is relative to the greatest of three: its own norm, the mean of those in its
    place in the batch and its heads, and the mean of all that are not 0. The first rows of long
    ones have outputs and rounding errors greater than most, but gradients that may cancel.
    Infinite where one is -inf or NaN and the other is not.
    """
    got, want = np.asarray(found, np.float32), np.asarray(exact, np.float32)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)) or np.any(got[~finite] != want[~finite]):
        return float("inf"), float("inf")
    got, want = (np.where(finite, x, 0) for x in (got, want))
    if want.ndim == 3:  # logsumexp, a number for each row
        got, want = got[..., None], want[..., None]
    away, norms = np.linalg.norm(got - want, axis=-1), np.linalg.norm(want, axis=-1)
    usual = norms[norms > 0].mean() if np.any(norms) else 1.0
    usual = np.maximum(usual, norms.mean((0, 2), keepdims=True))
    whole = np.linalg.norm(away) / (np.linalg.norm(norms) or 1.0)
    return float(whole), float((away / np.maximum(norms, usual)).max())


def _ignores_batch_mates(
    kernel: Callable[..., list[Array]], arrays: Sequence[Array], found: list[Array], steady: slice
) -> bool | None:
    """Whether the batch's first and last row have the same bits among copies of themselves."""
    batch = found[0].shape[0]
    if batch == 1:
        return None
    same = True
    for row in (0, batch - 1):
        copies = [
            jnp.asarray(np.repeat(np.asarray(x)[row : row + 1], batch, axis=0)) if x.ndim else x
            for x in arrays
        ]
        pairs = zip(found[steady], kernel(copies)[steady], strict=True)
        same &= all(_equal(a[row], b[row]) for a, b in pairs)
    return same


def _ignores_later_tokens(
    kernel: Callable[..., list[Array]],
    case: Case,
    inputs: Any,
    found: list[Array],
) -> bool | None:
    """Whether output and logsumexp of earlier rows have the same bits when later tokens change."""
    rows = case.unchanged_rows(inputs)
    if not rows:
        return None
    changed, _ = _distinct(case.inputs(changed=True))
    pairs = zip(found[:2], kernel(changed)[:2], strict=True)
    return all(_equal(a[:, :rows], b[:, :rows]) for a, b in pairs)


def _equal(first: Array, second: Array) -> bool:
    return np.array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


def _run(number: int, backend: str | None, repeats: int) -> dict[str, Any]:
    """One check; a failure of any kind is a result."""
    case = _CASES[number] if backend is None else _CASES[number].on(backend)
    try:
        return check(case, repeats)
    except Exception as error:  # the other checks are worth having
        message = f"{type(error).__name__}: {error}"[:2000]
        return {**case.describe(), "error": message, "passed": False}


def _run_share(
    numbers: Sequence[int], settings: Sequence[str], seconds: float
) -> list[dict[str, Any]]:
    """Checks in a process of their own, which a crash of one ends."""
    call = [sys.executable, __file__, *settings, "--checks", *map(str, numbers)]
    environment = os.environ | {
        # else each process takes most of the memory for itself
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # the compiler would look for the fastest way to compute what is compared with
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
    }
    try:
        done = subprocess.run(
            call, env=environment, capture_output=True, timeout=seconds, check=False
        )
        printed, said = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        printed, said = late.stdout or b"", f"not done after {seconds:g} s".encode()
    lines = printed.decode(errors="replace").splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    lost = [_CASES[number].describe() for number in numbers[len(found) :]]
    why = said.decode(errors="replace")[-1000:]
    found += [{**case, "error": f"lost: {why}", "passed": False} for case in lost]
    for result in found:
        print(json.dumps(result), flush=True)
    return found


def _report(results: Sequence[dict[str, Any]], commit: str | None) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions() | ({"commit": commit} if commit else {}),
        "kernels_sha256": kernels_hash(),
        "results": results,
    }


def _joined(paths: Sequence[Path]) -> dict[str, Any]:
    """One report of several, which must be of one kind of device, and of the same sources."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        for key in first.keys() - {"results"}:
            if other[key] != first[key]:
                raise SystemExit(f"{path} has other {key} than {paths[0]}; run both parts again")
        first["results"] += other["results"]
    return first


def _finish(report: dict[str, Any], path: Path | None) -> int:
    """Writes a report, and says how many checks passed."""
    results = report["results"]
    results.sort(key=lambda result: json.dumps([str(result.get(k)) for k in ("backend", "case")]))
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
    failed = sum(result["passed"] is False for result in results)
    unserved = sum(result["passed"] is None for result in results)
    passed = len(results) - failed - unserved
    print(f"{passed} passed, {failed} failed, {unserved} not served")
    return 1 if failed else 0


def _chosen(options: argparse.Namespace) -> list[int]:
    """Numbers of the cases that are asked for."""
    kind = _KINDS.get(options.operation, Case)
    numbers = []
    for number, case in enumerate(_CASES):
        described = json.dumps(case.describe())
        wanted = re.search(options.only, described) and not (options.short and case.is_long)
        if wanted and isinstance(case, kind):
            numbers.append(number)
    part, parts = options.part
    return numbers[part - 1 :: parts]


def _part(text: str) -> tuple[int, int]:
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r} is no part; give 1/2 or 2/2, say")
    return part, parts


def main() -> int:
    """Runs all checks, divided among processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="kept in the report (default: what git says)")
    parser.add_argument("--operation", choices=_KINDS, help="(default: all)")
    parser.add_argument("--only", default="", help="regular expression of described cases")
    parser.add_argument("--short", action="store_true", help="leaves out the long ones")
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="I/N", help="every N-th, from the I-th on"
    )
    parser.add_argument("--join", type=Path, nargs="+", help="reports of parts; checks nothing")
    parser.add_argument(
        "--backend", choices=("xla", "mosaic", "triton"), help="in place of each case's own"
    )
    parser.add_argument("--repeats", type=int, default=_REPEATS, help="compared bit for bit")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    text = "of a process, after which its remaining checks have failed (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=540, help=text)
    parser.add_argument("--checks", type=int, nargs="+", help="by number, in this process")
    parser.add_argument("--list", action="store_true", help="describes the cases alone")
    parser.add_argument("--hash", action="store_true", help="prints the kernels' hash alone")
    options = parser.parse_args()
    if options.hash:
        print(kernels_hash())
        return 0
    if options.join:
        return _finish(_joined(options.join), options.json)
    if options.checks:
        for number in options.checks:
            print(json.dumps(_run(number, options.backend, options.repeats)), flush=True)
        return 0
    numbers = _chosen(options)
    if options.list:
        for number in numbers:
            print(number, json.dumps(_CASES[number].describe()))
        return 0
    settings = ["--repeats", str(options.repeats)]
    settings += ["--backend", options.backend] if options.backend else []
    shares = [numbers[share :: options.processes] for share in range(options.processes)]
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        found = pool.map(
            lambda share: _run_share(share, settings, options.seconds), filter(len, shares)
        )
        results = [result for share in found for result in share]
    return _finish(_report(results, options.commit), options.json)


if __name__ == "__main__":
    sys.exit(main())
