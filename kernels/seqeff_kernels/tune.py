"""Finds the fastest plans of the GPU kernels on this device, and writes them to its table.

    python -m seqeff_kernels.tune [attention|decode] [SHAPE ...] [--missing] [--table FILE]

Each entry is written as soon as it is found. A candidate that does not compile or run is told and
skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from seqeff_kernels import gpu, tuning
from seqeff_kernels.candidates import MOSAIC_STEPS, TRITON_STEPS, Step, decode_steps
from seqeff_kernels.decode_attention import plan as decode_plan
from seqeff_kernels.decode_attention import shapes as decode_shapes
from seqeff_kernels.decode_attention import triton as decode_triton
from seqeff_kernels.range_attention import RangeSource, TokenSource, cost, explain, mosaic, triton
from seqeff_kernels.range_attention import shapes as attention_shapes
from seqeff_kernels.timing import device_times

ATTENTION_SHAPES = tuple(
    f"{family}-{length}"
    for family in ("wide", "pythia-160m", "grouped")
    for length in ("2k", "8k", "32k", "128k")
    if f"{family}-{length}" in attention_shapes.SHAPES
)
DECODE_SHAPES = (
    "multi-head",
    "grouped",
    "factored",
    "multi-head-long",
    "grouped-long",
    "factored-long",
    "separators",
    "draft",
)
WINDOWS = (64, 256)
BACKENDS = ("mosaic", "triton")
_DTYPE = jnp.bfloat16
# of one measurement of a candidate, and rough speeds from which its number of calls follows
_SECONDS = 0.03
_FLOPS_PER_SECOND = 2e14
_BYTES_PER_SECOND = 2e12
_REPEATS = 3
_ROTATED_BYTES = 1 << 28

# takes a plan and the name of a pass, and gives seconds
Timer = Callable[[Any, str], float]


def search(start: Any, steps: Sequence[Step], timer: Timer) -> tuple[Any, dict[str, float]] | None:
    """The best plan, and the seconds of each pass with it, or None where no candidate works.

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
                reason = str(error).strip().partition("\n")[0][:160]
                print(f"  skipped  {candidate}: {type(error).__name__}: {reason}", flush=True)
                continue
            print(f"  {1e3 * found[candidate]:8.4f} ms {step.timed:8} {candidate}", flush=True)
        if not found:
            return None
        plan = min(found, key=lambda candidate: found[candidate])
        times[step.timed] = found[plan]
    return plan, times


def tune_attention(
    name: str, window: int, path: Path, backends: Sequence[str] = BACKENDS, missing: bool = False
) -> None:
    """Tunes the backends that can serve separator attention of a named shape.

    With `missing`, entries that the table has already are left as they are.
    """
    shape = attention_shapes.SHAPES[name]
    sets, sources = _attention_inputs(shape, window)
    queries, keys, values, _, indices = sets[0]
    made = sources(keys, values, indices)
    key = tuning.attention_key(queries, made)
    spent = cost(queries, made)
    answers = explain(queries, made)
    starts = {
        "mosaic": (mosaic.Tiles(), MOSAIC_STEPS, mosaic.attend),
        "triton": (triton.plan(shape.head_dim, str(queries.dtype)), TRITON_STEPS, triton.attend),
    }
    for backend in backends:
        start, steps, attend = starts[backend]
        if missing and _listed(path, "attention", backend, key):
            continue
        print(f"{name} window {window} {backend}: {key}", flush=True)
        if answers[backend] != "available":
            print(f"  {answers[backend]}", flush=True)
            continue

        def timer(plan: Any, timed: str, attend: Callable[..., Any] = attend) -> float:
            def forward(queries, keys, values, _, indices):
                listed = sources(keys, values, indices)
                return attend(queries, listed, shape.head_dim**-0.5, plan)[0]

            def training(queries, keys, values, cotangent, indices):
                output, pull = jax.vjp(
                    lambda q, k, v: forward(q, k, v, cotangent, indices), queries, keys, values
                )
                return output, pull(cotangent)

            function, flops = forward, spent.forward_flops
            if timed == "training":
                function, flops = training, flops + spent.backward_flops
            return _time(function, sets, len(sets) * flops / _FLOPS_PER_SECOND)

        _record(path, "attention", backend, key, search(start, steps, timer))


def tune_decode(name: str, path: Path, missing: bool = False) -> None:
    """Tunes decoding of a named shape; `missing` as in `tune_attention`."""
    shape = decode_shapes.SHAPES[name]
    sizes = {
        "batch": shape.batch,
        "kv_heads": shape.kv_heads,
        "points": shape.rows * shape.heads // shape.kv_heads,
        "head_dim": shape.head_dim,
        "entries": shape.entries,
    }
    key = tuning.decode_key(dtype=jnp.dtype(_DTYPE).name, **sizes)
    if missing and _listed(path, "decode", "triton", key):
        return
    print(f"{name} triton: {key}", flush=True)
    make = jax.jit(decode_shapes.inputs, static_argnums=(0, 1, 2))
    size = shape.entry_bytes(jnp.dtype(_DTYPE).itemsize)
    count = max(2, math.ceil(4 * _ROTATED_BYTES / size))
    sets = [make(shape, seed, _DTYPE) for seed in range(count)]
    obstacle = decode_triton.obstacle(*sets[0])
    if obstacle:
        print(f"  {obstacle}", flush=True)
        return

    def timer(plan: Any, _: str) -> float:
        def call(queries, blocks, new):
            return decode_triton.attend(queries, blocks, new, shape.head_dim**-0.5, plan)[0]

        return _time(call, sets, len(sets) * size / _BYTES_PER_SECOND)

    start = decode_plan.plan(itemsize=jnp.dtype(_DTYPE).itemsize, **sizes)
    _record(path, "decode", "triton", key, search(start, decode_steps(start), timer))


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes what is asked for; exit status 2 where something asked for cannot be."""
    options = _parser().parse_args(arguments)
    known = {
        "attention": (attention_shapes.SHAPES, ATTENTION_SHAPES),
        "decode": (decode_shapes.SHAPES, DECODE_SHAPES),
    }
    operations = [options.operation] if options.operation else list(known)
    wanted = []
    for operation in operations:
        shapes, default = known[operation]
        for name in options.shapes or default:
            if name not in shapes:
                return _refuse(f"no shape of {operation} is called {name}: {', '.join(shapes)}")
            wanted.append((operation, name))
    try:
        found = gpu.compute_capability()
    except (RuntimeError, AssertionError) as error:  # what jax raises where no device is found
        return _refuse(f"no device: {str(error).strip().partition(chr(10))[0]}")
    if found is None:
        return _refuse(f"tuning needs an NVIDIA GPU; JAX's backend is {jax.default_backend()}")
    path = options.table or tuning.table_path(jax.devices()[0].device_kind)
    for operation, name in wanted:
        if operation == "decode":
            tune_decode(name, path, options.missing)
            continue
        for window in options.window:
            tune_attention(name, window, path, options.backend, options.missing)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seqeff_kernels.tune", description=__doc__)
    parser.add_argument("operation", nargs="?", choices=("attention", "decode"))
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="by name")
    parser.add_argument("--window", nargs="+", type=int, default=list(WINDOWS), help="of attention")
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="of attention"
    )
    parser.add_argument("--missing", action="store_true", help="only what the table lacks")
    parser.add_argument("--table", type=Path, help="written to (default: the package's)")
    return parser


def _refuse(message: str) -> int:
    print(f"tune: {message}", file=sys.stderr)
    return 2


def _attention_inputs(
    shape: attention_shapes.Shape, window: int
) -> tuple[list[tuple[Any, ...]], Callable[..., tuple[RangeSource, TokenSource]]]:
    """Sets of queries, keys, values, cotangent and indices, and what makes sources of them."""

    @jax.jit
    def index(chosen):
        unread = jnp.zeros((*chosen.shape, 1, 1), _DTYPE)
        far, _ = attention_shapes.separator_sources(unread, unread, chosen, window)
        return far.packed, far.start, far.end

    def sources(keys, values, indices):
        packed, start, end = indices
        far = RangeSource(keys, values, start, end, packed=packed)
        return far, TokenSource(keys, values, window=window)

    make = jax.jit(attention_shapes.tokens, static_argnums=(0, 1, 2))
    heads = shape.heads + 2 * shape.kv_heads
    size = shape.batch * shape.length * heads * shape.head_dim * jnp.dtype(_DTYPE).itemsize
    sets = []
    for seed in range(math.ceil(_ROTATED_BYTES / size)):
        queries, keys, values, chosen = make(shape, seed, _DTYPE)
        cotangent = jax.random.normal(jax.random.key(1000 + seed), queries.shape, _DTYPE)
        sets.append((queries, keys, values, cotangent, index(chosen)))
    return sets, sources


def _listed(path: Path, operation: str, backend: str, key: str) -> bool:
    return key in tuning.read(path).get(operation, {}).get(backend, {})


def _time(function: Callable[..., Any], sets: list[tuple[Any, ...]], seconds: float) -> float:
    """Of one call; `seconds` is a guess at a call on every set."""
    iterations = max(2, round(_SECONDS / seconds))
    return statistics.median(device_times(function, sets, iterations=iterations, repeats=_REPEATS))


def _record(
    path: Path,
    operation: str,
    backend: str,
    key: str,
    found: tuple[Any, dict[str, float]] | None,
) -> None:
    if found is None:
        print("  no candidate works; nothing is written", flush=True)
        return
    plan, times = found
    milliseconds = {timed: round(1e3 * seconds, 4) for timed, seconds in times.items()}
    entry = {"plan": dataclasses.asdict(plan), "milliseconds": milliseconds}
    tuning.record(path, operation, backend, key, entry)
    print(f"  best: {plan}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
