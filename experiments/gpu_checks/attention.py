"""Attention kernels on a GPU against the float32 reference, values and gradients.

    python experiments/gpu_checks/attention.py --json experiments/gpu_checks/RESULT.json

Needs one NVIDIA GPU. Exits with status 1 if a check fails. Backends that cannot serve here are
named with the reason. Checks are divided among processes, which compile at the same time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from seqeff.runs import versions
from seqeff_kernels.decode_attention import CacheBlock, decode_attention
from seqeff_kernels.decode_attention import explain as explain_decoding
from seqeff_kernels.range_attention import (
    RangeSource,
    Source,
    TokenSource,
    explain,
    range_attention,
    shapes,
)

_TOLERANCE = 1e-2  # relative, of bfloat16 and float16 operands
_REPEATS = 100

Inputs = tuple[Array, Sequence[Source]]


def dense(head_dim: int, dtype: str, window: int | None) -> Inputs:
    """Causal attention, whole or in a window; grouped heads."""
    queries, keys, values, _ = _tokens(2, 778, 6, 2, head_dim, dtype)
    return queries, [TokenSource(keys, values, window=window)]


def separators(head_dim: int, dtype: str) -> Inputs:
    """Packed initial tokens and separators, and a window; an odd length, grouped heads."""
    queries, keys, values, chosen = _tokens(2, 1000, 8, 2, head_dim, dtype)
    return queries, shapes.separator_sources(keys, values, chosen, 63)


def many_blocks(head_dim: int, dtype: str) -> Inputs:
    """Several blocks of rows for every multiprocessor, so that a program does one after another."""
    queries, keys, values, chosen = _tokens(4, 1500, 16, 8, head_dim, dtype)
    return queries, shapes.separator_sources(keys, values, chosen, 200)


def named(shape: str, dtype: str) -> Inputs:
    """A small one of the named shapes."""
    sizes = shapes.SHAPES[shape]
    queries, keys, values, chosen = shapes.tokens(sizes, dtype=dtype)
    return queries, shapes.separator_sources(keys, values, chosen, sizes.window)


def documents(head_dim: int, dtype: str) -> Inputs:
    """The same with packed documents, the first row padded on the left with NaN."""
    length, padding = 777, 100
    queries, keys, values, chosen = _tokens(2, length, 4, 4, head_dim, dtype)
    starts = np.repeat([[0, 150, 400, 401]], 2, 0)
    starts[0, 0] = padding
    token = np.arange(length)
    start = np.max(np.where(starts[..., None] <= token, starts[..., None], 0), axis=1)
    start[0, :padding] = padding
    real = jnp.asarray(token >= [[padding], [0]])
    keys, values = (jnp.where(real[..., None, None], x, jnp.nan) for x in (keys, values))
    return queries, shapes.separator_sources(
        keys, values, chosen & real, 100, jnp.asarray(start, jnp.int32)
    )


def random_bounds(head_dim: int, dtype: str) -> Inputs:
    """Three sources of random bounds, one with its own queries; empty rows; NaN in no range."""
    batch, rows, entries = 2, 700, 515
    queries, keys, values, _ = _tokens(batch, rows, 4, 2, head_dim, dtype)
    generator = np.random.default_rng(head_dim)
    sources: list[Source] = [TokenSource(keys, values, window=33, row_offset=-300)]
    for index, lines in enumerate(((batch, 2, rows), (batch, rows))):
        start, end = np.sort(generator.integers(0, entries, (2, *lines)), axis=-1)
        entry = np.arange(entries)[:, None]
        attended = ((start[..., None, :] <= entry) & (entry < end[..., None, :])).any(-1)
        attended = attended.swapaxes(1, 2) if index == 0 else attended[..., None]
        far_keys, far_values = (
            jnp.where(attended[..., None], x[:, :entries], jnp.nan) for x in (values, keys)
        )
        own = queries[:, ::-1] if index == 0 else None
        sources.append(RangeSource(far_keys, far_values, jnp.asarray(start), jnp.asarray(end), own))
    return queries, sources


@dataclass(frozen=True)
class Case:
    """One comparison of a backend with the reference."""

    backend: str
    make: Callable[..., Inputs]
    head_dim: int | str
    dtype: str = "bfloat16"
    window: int | str | None = "none"

    def inputs(self) -> Inputs:
        """Queries and sources."""
        extra = () if self.window == "none" else (self.window,)
        return self.make(self.head_dim, self.dtype, *extra)

    def describe(self) -> dict:
        """The case, for the report."""
        described = {"backend": self.backend, "case": self.make.__name__}
        if self.window != "none":
            described["window"] = self.window
        size = "shape" if isinstance(self.head_dim, str) else "head_dim"
        return {**described, size: self.head_dim, "dtype": self.dtype}


CASES = (
    *(Case("cudnn", dense, d, window=w) for d in (64, 80, 96, 128, 256) for w in (None, 256)),
    Case("cudnn", dense, 128, "float16", window=None),
    *(
        Case(backend, make, head_dim)
        for backend in ("mosaic", "triton")
        for make in (separators, documents, random_bounds, many_blocks)
        for head_dim in (64, 128)
    ),
    *(
        Case("triton", make, head_dim)
        for make in (separators, documents, random_bounds)
        for head_dim in (80, 96, 256)
    ),
    *(Case(b, random_bounds, d, "float16") for b in ("mosaic", "triton") for d in (64, 128)),
    *(Case("triton", named, shape) for shape in ("odd", "multi-query")),
    Case("triton", separators, 64, "float32"),
    *(Case("mosaic", dense, d, window=w) for d in (64, 128) for w in (None, 256)),
)


def check(case: Case) -> dict:
    """Relative errors of output, logsumexp and all gradients; 100 runs are compared bit for bit."""
    queries, sources = case.inputs()
    obstacle = explain(queries, sources)[case.backend]
    if obstacle != "available":
        return {**case.describe(), "passed": None, "obstacle": obstacle}
    weights = jax.random.normal(jax.random.key(3), queries.shape, jnp.float32)

    def run(backend: str, queries: Array, sources: Sequence[Source]) -> list[Array]:
        def loss(queries, sources):
            output, logsumexp = range_attention(queries, sources, backend=backend)
            finite = jnp.where(jnp.isneginf(logsumexp), 0, jnp.sin(logsumexp))
            return (output.astype(jnp.float32) * weights).sum() + finite.sum(), (output, logsumexp)

        gradients, outputs = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(queries, sources)
        leaves = jax.tree.leaves((outputs, gradients))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]

    wide_queries, wide_sources = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, Array) and x.dtype == case.dtype else x,
        (queries, sources),
    )
    exact = jax.jit(lambda *x: run("reference", *x))(wide_queries, wide_sources)
    kernel = jax.jit(lambda *x: run(case.backend, *x))
    found = kernel(queries, sources)
    errors = [_error(a, b) for a, b in zip(found, exact, strict=True)]
    # cuDNN's backward adds in an order that changes
    repeats = 1 if case.backend == "cudnn" else _REPEATS
    same = all(
        bool(jnp.array_equal(a, b, equal_nan=True))
        for _ in range(repeats - 1)
        for a, b in zip(found, kernel(queries, sources), strict=True)
    )
    return {
        **case.describe(),
        "relative_errors": [float(f"{error:.2g}") for error in errors],
        "runs_with_the_same_bits": repeats if same else 0,
        "passed": same and max(errors) < _TOLERANCE,
    }


def check_decoding(
    backend: str, head_dim: int, heads: int, kv_heads: int, rows: int, dtype: str
) -> dict:
    """Relative errors of decoding over two caches and new entries, with NaN beyond the filled."""
    # the copy engine takes multiples of 8
    batch, capacities = 3, (1000, 333 if backend == "triton" else 336)
    generator = np.random.default_rng(head_dim)

    def random(*shape: int) -> Array:
        return jnp.asarray(generator.normal(size=shape), dtype)

    queries = random(batch, rows, heads, head_dim)
    blocks = []
    for capacity in capacities:
        filled = jnp.asarray([capacity, 0, generator.integers(1, capacity)], jnp.int32)
        beyond = (jnp.arange(capacity) >= filled[:, None])[..., None, None]
        keys, values = (
            jnp.where(beyond, jnp.nan, random(batch, capacity, kv_heads, head_dim))
            for _ in range(2)
        )
        blocks.append(CacheBlock(keys, values, filled))
    new = random(batch, rows, kv_heads, head_dim), random(batch, rows, kv_heads, head_dim)
    described = {
        "backend": backend,
        "case": "decoding",
        "head_dim": head_dim,
        "dtype": dtype,
        "heads": [heads, kv_heads],
        "rows": rows,
    }
    obstacle = explain_decoding(queries, blocks, new=new)[backend]
    if obstacle != "available":
        return {**described, "passed": None, "obstacle": obstacle}

    def run(backend, *inputs):
        return decode_attention(inputs[0], inputs[1], new=inputs[2], backend=backend)

    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, (queries, blocks, new)
    )
    exact = jax.jit(lambda *x: run("reference", *x))(*wide)
    kernel = jax.jit(lambda *x: run(backend, *x))
    found = kernel(queries, blocks, new)
    errors = [_error(a, b) for a, b in zip(found, exact, strict=True)]
    same = all(
        bool(jnp.array_equal(a, b))
        for _ in range(_REPEATS - 1)
        for a, b in zip(found, kernel(queries, blocks, new), strict=True)
    )
    return {
        **described,
        "relative_errors": [float(f"{error:.2g}") for error in errors],
        "runs_with_the_same_bits": _REPEATS if same else 0,
        "passed": same and max(errors) < _TOLERANCE,
    }


# backend, head size, heads, KV heads, rows
DECODING = (
    ("triton", 128, 32, 32, 1, "bfloat16"),
    ("triton", 128, 32, 8, 4, "bfloat16"),
    ("triton", 256, 64, 1, 1, "bfloat16"),
    ("triton", 64, 12, 12, 2, "float16"),
    ("triton", 80, 8, 2, 1, "bfloat16"),
    ("triton", 96, 4, 4, 3, "float16"),
    ("mosaic", 256, 64, 1, 1, "bfloat16"),
    ("mosaic", 256, 64, 1, 3, "float16"),
    ("mosaic", 128, 64, 2, 2, "bfloat16"),
    ("mosaic", 64, 32, 1, 1, "float16"),
)


def _tokens(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str):
    shape = shapes.Shape(
        batch=batch, length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, density=0.2
    )
    return shapes.tokens(shape, seed=head_dim, dtype=dtype)


def _error(found: Array, exact: Array) -> float:
    """Relative, in the Euclidean norm; infinite where one is -inf or NaN and the other is not."""
    got, want = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)):
        return float("inf")
    scale = np.linalg.norm(want[finite])
    return float(np.linalg.norm(got[finite] - want[finite]) / (scale or 1.0))


def _run(number: int) -> dict:
    """One check; a failure of any kind is a result."""
    try:
        if number < len(CASES):
            return check(CASES[number])
        return check_decoding(*DECODING[number - len(CASES)])
    except Exception as error:  # the other checks are worth having
        what = CASES[number].describe() if number < len(CASES) else {"case": "decoding"}
        return {**what, "error": f"{type(error).__name__}: {error}", "passed": False}


def _run_part(numbers: Sequence[int]) -> list[dict]:
    """Checks in a process of their own, which a crash of one ends."""
    call = [sys.executable, __file__, "--checks", *map(str, numbers)]
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
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--checks", type=int, nargs="+", help="by number, in this process")
    options = parser.parse_args()
    if options.checks:
        for number in options.checks:
            print(json.dumps(_run(number)), flush=True)
        return 0
    numbers = {
        None: range(len(CASES) + len(DECODING)),
        "range": range(len(CASES)),
        "decode": range(len(CASES), len(CASES) + len(DECODING)),
    }[options.operation]
    parts = [numbers[part :: options.processes] for part in range(options.processes)]
    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        found = pool.map(_run_part, filter(len, parts))
        results = [result for part in found for result in part]
    results.sort(key=lambda result: json.dumps([str(result.get(k)) for k in ("backend", "case")]))
    device = jax.devices()[0]
    report = {"device": device.device_kind, "versions": versions(), "results": results}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [result for result in results if result["passed"] is False]
    unserved = sum(result["passed"] is None for result in results)
    passed = len(results) - len(failed) - unserved
    print(f"{passed} passed, {len(failed)} failed, {unserved} not served")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
