"""Finds the fastest plans of the GPU kernels on this device, and writes them to its table.

    python -m seqeff_kernels.tune [attention|decode] [SHAPE ...] [--missing] [--table FILE]

Candidates compile in several processes at a time and run one after another. Each entry is written
as soon as it is found. A candidate that does not compile or run is told and skipped. So is one that
ends its process, leaves the device unusable or hangs: a new process goes on with the other
candidates, and times none of them again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
from seqeff_kernels.measuring import Journal, run_task, search
from seqeff_kernels.range_attention import (
    Source,
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
    "pythia-160m",
    "pythia-160m-two",
    "draft",
)
WINDOWS = (64, 256)
BACKENDS = ("mosaic", "triton", "cudnn")
_DTYPE = jnp.bfloat16
# of one measurement of a candidate, and rough speeds from which its number of calls follows
_SECONDS = 0.03
_FLOPS_PER_SECOND = 2e14
_BYTES_PER_SECOND = 2e12
_REPEATS = 3
_ROTATED_BYTES = 1 << 28
# what a task's process runs
_PROGRAM = (sys.executable, "-m", "seqeff_kernels.tune")


class Task(NamedTuple):
    """What is tuned together: the arguments of a call of this module."""

    operation: str
    shape: str
    kind: str | None = None
    window: int | None = None


def tune_attention(
    task: Task,
    path: Path,
    journal: Journal,
    backends: Sequence[str] = BACKENDS,
    missing: bool = False,
) -> bool:
    """Tunes the backends that can serve an attention of a named shape.

    Args:
      path: of the table.
      missing: entries that the table has already are left as they are.

    Returns:
      whether there is a plan for every backend that can serve.
    """
    shape = attention_shapes.SHAPES[task.shape]
    with journal.alone():
        sets, sources = _attention_inputs(shape, task)
        jax.block_until_ready(sets)
    queries, keys, values, _, lists = sets[0]
    made = sources(queries, keys, values, lists)
    key = tuning.attention_key(queries, made)
    spent = cost(queries, made)
    answers = explain(queries, made)
    starts = {
        "mosaic": (mosaic.Tiles(), MOSAIC_STEPS, mosaic.attend),
        "triton": (triton.plan(shape.head_dim, str(queries.dtype)), TRITON_STEPS, triton.attend),
        # it has no plan to find, and is timed to be compared
        "cudnn": (cudnn.Plan(), (Step("forward", ()), Step("training", ())), cudnn.attend),
    }
    complete = True
    for backend in backends:
        start, steps, attend = starts[backend]
        if missing and _listed(path, "attention", backend, key):
            continue
        print(f"{task.shape} {backend}: {key}", flush=True)
        if answers[backend] != "available":
            print(f"  {answers[backend]}", flush=True)
            continue

        def timer(plan: Any, timed: str, attend: Callable[..., Any] = attend) -> float:
            def forward(queries, keys, values, _, lists):
                listed = sources(queries, keys, values, lists)
                return attend(queries, listed, shape.head_dim**-0.5, plan)[0]

            def training(queries, keys, values, cotangent, lists):
                output, pull = jax.vjp(
                    lambda q, k, v: forward(q, k, v, cotangent, lists), queries, keys, values
                )
                return output, pull(cotangent)

            function, flops = forward, spent.forward_flops
            if timed == "training":
                function, flops = training, flops + spent.backward_flops
            return _time(function, sets, len(sets) * flops / _FLOPS_PER_SECOND, journal)

        found = search(start, steps, journal.timed(f"{backend} {key}", timer))
        complete &= _record(path, "attention", backend, key, found, journal)
    return complete


def tune_decode(task: Task, path: Path, journal: Journal, missing: bool = False) -> bool:
    """Tunes the backends that can serve decoding of a named shape; as `tune_attention`."""
    shape = decode_shapes.SHAPES[task.shape]
    size = shape.entry_bytes(jnp.dtype(_DTYPE).itemsize)
    make = jax.jit(decode_shapes.inputs, static_argnums=(0, 2))
    with journal.alone():
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
    complete = True
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

            return _time(call, sets, len(sets) * size / _BYTES_PER_SECOND, journal)

        found = search(start, steps, journal.timed(f"{backend} {key}", timer))
        complete &= _record(path, "decode", backend, key, found, journal)
    return complete


def main(arguments: Sequence[str] | None = None) -> int:
    """Tunes what is asked for.

    Returns:
      exit status 1 where a backend that can serve got no plan; 2 where something asked for cannot
      be.
    """
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
    # else each process takes most of the memory for itself
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        found = gpu.compute_capability()
    except (RuntimeError, AssertionError) as error:  # what jax raises where no device is found
        return _refuse(f"no device: {str(error).strip().partition(chr(10))[0]}")
    if found is None:
        return _refuse(f"tuning needs an NVIDIA GPU; JAX's backend is {jax.default_backend()}")
    path = options.table or tuning.table_path(jax.devices()[0].device_kind)
    if options.journal is None:
        return _run_processes(tasks, path, options)
    journal = Journal(options.journal, options.lock)
    complete = True
    for task in tasks:
        if task.operation == "decode":
            complete &= tune_decode(task, path, journal, options.missing)
        else:
            complete &= tune_attention(task, path, journal, options.backend, options.missing)
    return 0 if complete else 1


def _run_processes(tasks: Sequence[Task], path: Path, options: argparse.Namespace) -> int:
    """Runs this module for every task, several at a time, which a failure cannot spread among."""
    common = ["--table", str(path), "--backend", *options.backend]
    common += ["--missing"] if options.missing else []

    def run(numbered: tuple[int, Task]) -> bool:
        number, task = numbered
        chosen = [task.operation, task.shape]
        chosen += ["--kind", task.kind] if task.kind else []
        chosen += ["--window", str(task.window)] if task.window else []
        written = Path(folder, f"{number}.jsonl")
        written.touch()
        files = ["--journal", str(written), "--lock", str(lock)]
        return run_task([*_PROGRAM, *chosen, *common, *files], Journal(written), options.timeout)

    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(options.processes) as pool,
    ):
        lock = Path(folder, "lock")
        lock.touch()
        return 0 if all(list(pool.map(run, enumerate(tasks)))) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seqeff_kernels.tune", description=__doc__)
    parser.add_argument("operation", nargs="?", choices=("attention", "decode"))
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="by name")
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=attention_shapes.KINDS,
        default=attention_shapes.KINDS,
        help="of attention",
    )
    parser.add_argument("--window", nargs="+", type=int, default=list(WINDOWS), help="of attention")
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="of attention"
    )
    parser.add_argument("--missing", action="store_true", help="only what the table lacks")
    parser.add_argument("--table", type=Path, help="written to (default: the package's)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds after which a candidate that does not end is skipped (default: %(default)s)",
    )
    # of a task's process: its journal, and the file whose lock it holds while it uses the device
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    return parser


def _refuse(message: str) -> int:
    print(f"tune: {message}", file=sys.stderr)
    return 2


def _attention_inputs(
    shape: attention_shapes.Shape, task: Task
) -> tuple[list[tuple[Any, ...]], Callable[..., tuple[Source, ...]]]:
    """Sets of queries, keys, values, cotangent and packed lists, and what makes sources of them."""
    assert task.kind is not None
    index = jax.jit(
        functools.partial(attention_shapes.packed_lists, task.kind), static_argnums=(1, 2)
    )
    sources = functools.partial(attention_shapes.kind_sources, task.kind, window=task.window)
    make = jax.jit(attention_shapes.tokens, static_argnums=(0, 2))
    draw = jax.jit(lambda seed, like: jax.random.normal(jax.random.key(seed), like.shape, _DTYPE))
    heads = shape.heads + 2 * shape.kv_heads
    size = shape.batch * shape.length * heads * shape.head_dim * jnp.dtype(_DTYPE).itemsize
    sets = []
    for seed in range(math.ceil(_ROTATED_BYTES / size)):
        queries, keys, values, chosen = make(shape, seed, _DTYPE)
        lists = index(chosen, shape.initial, task.window)
        sets.append((queries, keys, values, draw(1000 + seed, queries), lists))
    return sets, sources


def _listed(path: Path, operation: str, backend: str, key: str) -> bool:
    return key in tuning.read(path).get(operation, {}).get(backend, {})


def _time(
    function: Callable[..., Any], sets: list[tuple[Any, ...]], seconds: float, journal: Journal
) -> float:
    """Of one call; `seconds` is a guess at a call on every set."""
    iterations = max(2, round(_SECONDS / seconds))
    return statistics.median(
        device_times(function, sets, iterations=iterations, repeats=_REPEATS, alone=journal.alone)
    )


def _record(
    path: Path,
    operation: str,
    backend: str,
    key: str,
    found: tuple[Any, dict[str, float]] | None,
    journal: Journal,
) -> bool:
    """Writes an entry, if one was found; whether it was."""
    if found is None:
        print("  no candidate works; nothing is written", flush=True)
        return False
    plan, times = found
    milliseconds = {timed: round(1e3 * seconds, 4) for timed, seconds in times.items()}
    entry = {"plan": dataclasses.asdict(plan), "milliseconds": milliseconds}
    with journal.alone():
        tuning.record(path, operation, backend, key, entry)
    print(f"  best: {plan}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
