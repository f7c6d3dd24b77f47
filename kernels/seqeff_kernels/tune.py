"""Finds the fastest plans of the GPU kernels on this device, and writes them to its table.

    python -m seqeff_kernels.tune [attention|decode] [SHAPE ...] [--missing] [--table FILE]

Candidates compile in several processes at a time and run one after another. Each entry is written
as soon as it is found. A candidate that does not compile or run is told and skipped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from seqeff_kernels import gpu, tuning
from seqeff_kernels.candidates import (
    MOSAIC_STEPS,
    TRITON_STEPS,
    Step,
    decode_steps,
    mosaic_decode_steps,
)
from seqeff_kernels.decode_attention import mosaic as decode_mosaic
from seqeff_kernels.decode_attention import plan as decode_plan
from seqeff_kernels.decode_attention import shapes as decode_shapes
from seqeff_kernels.decode_attention import triton as decode_triton
from seqeff_kernels.range_attention import (
    RangeSource,
    Source,
    TokenSource,
    cost,
    cudnn,
    explain,
    mosaic,
    triton,
)
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
# what is attended: packed separators and a window, a window alone, every earlier token
KINDS = ("separators", "window", "causal")
BACKENDS = ("mosaic", "triton", "cudnn")
_DTYPE = jnp.bfloat16
# of one measurement of a candidate, and rough speeds from which its number of calls follows
_SECONDS = 0.03
_FLOPS_PER_SECOND = 2e14
_BYTES_PER_SECOND = 2e12
_REPEATS = 3
_ROTATED_BYTES = 1 << 28

# takes a plan and the name of a pass, and gives seconds
Timer = Callable[[Any, str], float]
Alone = Callable[[], contextlib.AbstractContextManager[Any]]


class Task(NamedTuple):
    """What is tuned together: the arguments of a call of this module."""

    operation: str
    shape: str
    kind: str | None = None
    window: int | None = None


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
    task: Task,
    path: Path,
    backends: Sequence[str] = BACKENDS,
    missing: bool = False,
    alone: Alone = contextlib.nullcontext,
) -> None:
    """Tunes the backends that can serve an attention of a named shape.

    With `missing`, entries that the table has already are left as they are.
    """
    shape = attention_shapes.SHAPES[task.shape]
    with alone():
        sets, sources = _attention_inputs(shape, task)
        jax.block_until_ready(sets)
    queries, keys, values, _, indices = sets[0]
    made = sources(keys, values, indices)
    key = tuning.attention_key(queries, made)
    spent = cost(queries, made)
    answers = explain(queries, made)
    starts = {
        "mosaic": (mosaic.Tiles(), MOSAIC_STEPS, mosaic.attend),
        "triton": (triton.plan(shape.head_dim, str(queries.dtype)), TRITON_STEPS, triton.attend),
        # it has no plan to find, and is timed to be compared
        "cudnn": (cudnn.Plan(), (Step("forward", ()), Step("training", ())), cudnn.attend),
    }
    for backend in backends:
        start, steps, attend = starts[backend]
        if missing and _listed(path, "attention", backend, key):
            continue
        print(f"{task.shape} {backend}: {key}", flush=True)
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
            return _time(function, sets, len(sets) * flops / _FLOPS_PER_SECOND, alone)

        _record(path, "attention", backend, key, search(start, steps, timer), alone)


def tune_decode(
    task: Task, path: Path, missing: bool = False, alone: Alone = contextlib.nullcontext
) -> None:
    """Tunes the backends that can serve decoding of a named shape; as `tune_attention`."""
    shape = decode_shapes.SHAPES[task.shape]
    size = shape.entry_bytes(jnp.dtype(_DTYPE).itemsize)
    make = jax.jit(decode_shapes.inputs, static_argnums=(0, 2))
    with alone():
        count = max(2, math.ceil(4 * _ROTATED_BYTES / size))
        sets = [make(shape, seed, _DTYPE) for seed in range(count)]
        jax.block_until_ready(sets)
    sizes = decode_plan.Sizes.of(*sets[0])
    key = sizes.key(jnp.dtype(_DTYPE).name)
    triton_start = decode_plan.plan(sizes, jnp.dtype(_DTYPE).itemsize)
    mosaic_start = decode_mosaic.plan(sizes)
    starts = {
        "triton": (triton_start, decode_steps(triton_start), decode_triton),
        "mosaic": (mosaic_start, mosaic_decode_steps(mosaic_start), decode_mosaic),
    }
    for backend, (start, steps, module) in starts.items():
        if missing and _listed(path, "decode", backend, key):
            continue
        print(f"{task.shape} {backend}: {key}", flush=True)
        obstacle = module.obstacle(*sets[0])
        if obstacle:
            print(f"  {obstacle}", flush=True)
            continue

        def timer(plan: Any, _: str, attend: Callable[..., Any] = module.attend) -> float:
            def call(queries, blocks, new):
                return attend(queries, blocks, new, shape.head_dim**-0.5, plan)[0]

            return _time(call, sets, len(sets) * size / _BYTES_PER_SECOND, alone)

        _record(path, "decode", backend, key, search(start, steps, timer), alone)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes what is asked for; exit status 2 where something asked for cannot be."""
    options = _parser().parse_args(arguments)
    known = {
        "attention": (attention_shapes.SHAPES, ATTENTION_SHAPES),
        "decode": (decode_shapes.SHAPES, DECODE_SHAPES),
    }
    operations = [options.operation] if options.operation else list(known)
    tasks: list[Task] = []
    for operation in operations:
        shapes, default = known[operation]
        for name in options.shapes or default:
            if name not in shapes:
                return _refuse(f"no shape of {operation} is called {name}: {', '.join(shapes)}")
            if operation == "decode":
                tasks.append(Task(operation, name))
                continue
            for kind in options.kind:
                windows = [None] if kind == "causal" else options.window
                tasks += [Task(operation, name, kind, window) for window in windows]
    try:
        found = gpu.compute_capability()
    except (RuntimeError, AssertionError) as error:  # what jax raises where no device is found
        return _refuse(f"no device: {str(error).strip().partition(chr(10))[0]}")
    if found is None:
        return _refuse(f"tuning needs an NVIDIA GPU; JAX's backend is {jax.default_backend()}")
    path = options.table or tuning.table_path(jax.devices()[0].device_kind)
    if len(tasks) > 1 and options.processes > 1:
        return _run_processes(tasks, path, options)
    for task in tasks:
        if task.operation == "decode":
            tune_decode(task, path, options.missing, _lock(options.lock))
        else:
            tune_attention(task, path, options.backend, options.missing, _lock(options.lock))
    return 0


def _run_processes(tasks: Sequence[Task], path: Path, options: argparse.Namespace) -> int:
    """Runs this module for every task, several at a time, which a failure cannot spread among."""
    common = ["--table", str(path), "--backend", *options.backend]
    common += ["--missing"] if options.missing else []
    # else each process takes most of the memory for itself
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def run(task: Task) -> bool:
        chosen = [task.operation, task.shape]
        chosen += ["--kind", task.kind] if task.kind else []
        chosen += ["--window", str(task.window)] if task.window else []
        call = [sys.executable, "-m", __spec__.name, *chosen, *common, "--lock", lock.name]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
        ending = "" if done.returncode == 0 else f"  failed:\n{done.stderr[-2000:]}\n"
        print(done.stdout + ending, end="", flush=True)
        return done.returncode == 0

    with (
        tempfile.NamedTemporaryFile() as lock,
        concurrent.futures.ThreadPoolExecutor(options.processes) as pool,
    ):
        return 0 if all(list(pool.map(run, tasks))) else 1


def _lock(path: str | None) -> Alone:
    """What holds a file's lock, so that one process at a time uses the device."""
    if path is None:
        return contextlib.nullcontext

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return alone


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seqeff_kernels.tune", description=__doc__)
    parser.add_argument("operation", nargs="?", choices=("attention", "decode"))
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="by name")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="of attention")
    parser.add_argument("--window", nargs="+", type=int, default=list(WINDOWS), help="of attention")
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="of attention"
    )
    parser.add_argument("--missing", action="store_true", help="only what the table lacks")
    parser.add_argument("--table", type=Path, help="written to (default: the package's)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--lock", help="a file whose lock is held while the device is used")
    return parser


def _refuse(message: str) -> int:
    print(f"tune: {message}", file=sys.stderr)
    return 2


def _attention_inputs(
    shape: attention_shapes.Shape, task: Task
) -> tuple[list[tuple[Any, ...]], Callable[..., tuple[Source, ...]]]:
    """Sets of queries, keys, values, cotangent and indices, and what makes sources of them."""

    @jax.jit
    def index(chosen):
        if task.kind != "separators" or task.window is None:
            return ()
        unread = jnp.zeros((*chosen.shape, 1, 1), _DTYPE)
        far, _ = attention_shapes.separator_sources(unread, unread, chosen, task.window)
        return far.packed, far.start, far.end

    def sources(keys: Array, values: Array, indices: Any) -> tuple[Source, ...]:
        tokens = TokenSource(keys, values, window=task.window)
        if not indices:
            return (tokens,)
        packed, start, end = indices
        return RangeSource(keys, values, start, end, packed=packed), tokens

    make = jax.jit(attention_shapes.tokens, static_argnums=(0, 2))
    draw = jax.jit(lambda seed, like: jax.random.normal(jax.random.key(seed), like.shape, _DTYPE))
    heads = shape.heads + 2 * shape.kv_heads
    size = shape.batch * shape.length * heads * shape.head_dim * jnp.dtype(_DTYPE).itemsize
    sets = []
    for seed in range(math.ceil(_ROTATED_BYTES / size)):
        queries, keys, values, chosen = make(shape, seed, _DTYPE)
        sets.append((queries, keys, values, draw(1000 + seed, queries), index(chosen)))
    return sets, sources


def _listed(path: Path, operation: str, backend: str, key: str) -> bool:
    return key in tuning.read(path).get(operation, {}).get(backend, {})


def _time(
    function: Callable[..., Any], sets: list[tuple[Any, ...]], seconds: float, alone: Alone
) -> float:
    """Of one call; `seconds` is a guess at a call on every set."""
    iterations = max(2, round(_SECONDS / seconds))
    return statistics.median(
        device_times(function, sets, iterations=iterations, repeats=_REPEATS, alone=alone)
    )


def _record(
    path: Path,
    operation: str,
    backend: str,
    key: str,
    found: tuple[Any, dict[str, float]] | None,
    alone: Alone,
) -> None:
    if found is None:
        print("  no candidate works; nothing is written", flush=True)
        return
    plan, times = found
    milliseconds = {timed: round(1e3 * seconds, 4) for timed, seconds in times.items()}
    entry = {"plan": dataclasses.asdict(plan), "milliseconds": milliseconds}
    with alone():
        tuning.record(path, operation, backend, key, entry)
    print(f"  best: {plan}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
