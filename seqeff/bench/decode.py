"""Bytes a second of decoding attention, against a copy of the device's memory in the same run."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from seqeff.bench import torch_attention
from seqeff.bench.programs import Program, iterations_for, time_all
from seqeff.bench.report import attempt, chosen_shapes, label
from seqeff_kernels.decode_attention import (
    Backend,
    CacheBlock,
    decode_attention,
    execution,
    explain,
)
from seqeff_kernels.decode_attention.plan import query_tile
from seqeff_kernels.decode_attention.shapes import SHAPES, Shape, inputs
from seqeff_kernels.range_attention.mosaic.tiles import BLOCK
from seqeff_kernels.timing import device_times

DEFAULT_SHAPES = (
    "multi-head",
    "grouped",
    "factored",
    "multi-head-long",
    "grouped-long",
    "factored-long",
)
# bytes read and written a second by a copy, measured elsewhere on devices of the kind
KNOWN_COPY = {"NVIDIA H200": 4.30e12, "NVIDIA H100 80GB HBM3": 2.99e12}
_DTYPE = jnp.bfloat16
# of all sets of caches: well over four times an H200's L2 cache, and long beside a loop's counter
_ROTATED_BYTES = 1 << 30
_COPIED_BYTES = 1 << 31
_COPIES = 50
_REPEATS = 5
# of a loop, and a speed that makes it no shorter
_SECONDS = 0.1
_BYTES_PER_SECOND = 4e12


def copy_speeds() -> dict[str, float]:
    """Bytes read plus bytes written a second, by two ways to copy 2 GiB on the device.

    `memory_copy` is a program whose result is its argument, which XLA does by the driver's copy
    of device memory; `elementwise` is a kernel of XLA's that reads one array and writes another.
    """
    array = jax.random.bits(jax.random.key(0), (_COPIED_BYTES // 4,), jnp.uint32)
    kernel = statistics.median(device_times(lambda x: x ^ 1, [(array,)]))
    jax.block_until_ready(jnp.copy(array))
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        for _ in range(_COPIES):
            # a call costs the host less than a copy takes, so copies follow each other closely
            copied = jnp.copy(array)
        jax.block_until_ready(copied)
        times.append((time.perf_counter() - begin) / _COPIES)
    moved = 2 * _COPIED_BYTES
    return {"memory_copy": moved / statistics.median(times), "elementwise": moved / kernel}


def reference_speed(copies: dict[str, float], device_kind: str) -> float:
    """Bytes a second that shares are of: the fastest copy, here or known of such a device."""
    return max(*copies.values(), KNOWN_COPY.get(device_kind, 0.0))


def benchmark_decode(
    names: Sequence[str] = (), *, reference: float, rivals: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields one row for each shape and implementation, as they are measured.

    A row has the fields of its shape, `bytes` (all keys and values once), `implementation`, the
    `backend` that served and the fields of its `plan`, the `needed_flops` of the call and the
    `executed_flops` of the whole tiles that serve it (None where that is not known), the median,
    fastest and slowest `microseconds` over the repeats, `bytes_per_second` and its `share` of
    `reference`; or `error`. Caches are full, and rotated so that none stays in L2. All programs of
    a shape are compiled before the first of them runs, and then run in turn.

    Args:
      names: of `seqeff_kernels.decode_attention.shapes.SHAPES`; none: the six of the README.
      reference: bytes a second.
      rivals: measure PyTorch's FlexAttention too; `prepare_rivals` comes before the first use of a
        device.
    """
    for name in chosen_shapes(names, SHAPES, DEFAULT_SHAPES):
        shape = SHAPES[name]
        # before this process takes memory for the shape
        theirs = torch_attention.run_decode(shape) if rivals and _is_one_full_block(shape) else None
        size = shape.entry_bytes(jnp.dtype(_DTYPE).itemsize)
        make = functools.partial(jax.jit(inputs, static_argnums=(0, 2)), shape)
        sets = [make(seed, _DTYPE) for seed in range(max(2, math.ceil(_ROTATED_BYTES / size)))]
        seconds = size / _BYTES_PER_SECOND
        iterations = iterations_for(_SECONDS, len(sets), of_call=seconds)
        programs = [
            (implementation, facts, Program(attend, sets, iterations))
            for implementation, facts, attend in _implementations(shape, sets[0])
        ]
        time_all(program for *_, program in programs)
        flops = needed_flops(shape)
        measured = {
            implementation: attempt(_measure, program, size, flops, reference)
            for implementation, _, program in programs
        }
        served = [(implementation, facts) for implementation, facts, _ in programs]
        if theirs is not None:
            served.append(("flex", {"backend": "flex", "plan": {}}))
            measured["flex"] = (
                {"error": theirs["error"]}
                if "error" in theirs
                else _rates(theirs["times"], size, flops, reference)
            )
        against = {
            field: measured.get(rival, {}).get("microseconds")
            for field, rival in (("speedup", "cudnn"), ("speedup_over_flex", "flex"))
        }
        for implementation, facts in served:
            found = measured[implementation]
            if "microseconds" in found:
                found |= {
                    field: None if time is None else round(time / found["microseconds"], 3)
                    for field, time in against.items()
                }
            yield {
                "shape": name,
                "implementation": implementation,
                "batch": shape.batch,
                "capacities": list(shape.capacities),
                "heads": shape.heads,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "rows": shape.rows,
                "dtype": jnp.dtype(_DTYPE).name,
                "bytes": size,
                **facts,
                "needed_flops": flops,
                "executed_flops": executed_flops(shape, facts["backend"], facts["plan"]),
            } | found


def needed_flops(shape: Shape) -> int:
    """Of both products, for every entry that a query attends."""
    return 4 * shape.batch * shape.rows * shape.heads * shape.entries * shape.head_dim


def executed_flops(shape: Shape, backend: str, plan: Mapping[str, Any]) -> int | None:
    """Of the tiles of query points and entries that a backend computes; None: not known."""
    points = shape.rows * shape.heads // shape.kv_heads
    if backend == "xla":
        return needed_flops(shape)
    tiles = {"triton": query_tile(points), "mosaic": BLOCK}
    if backend not in tiles:
        return None
    tile, entries = tiles[backend], plan["tile_entries"]
    lists = [*shape.capacities, *([shape.rows] if shape.new else [])]
    whole = sum(-(-count // entries) * entries for count in lists)
    computed = -(-points // tile) * tile
    return 4 * shape.batch * shape.kv_heads * computed * whole * shape.head_dim


def _implementations(
    shape: Shape, example: tuple[Any, ...]
) -> Iterator[tuple[str, dict[str, Any], Callable[..., Array]]]:
    """Names, what serves them, and what to call."""
    queries, blocks, new = example
    answers = explain(queries, blocks, new=new)
    backends: tuple[Backend, ...] = ("triton", "mosaic", "xla", "auto")
    for backend in backends:
        if backend == "auto" or answers[backend] == "available":
            served = execution(queries, blocks, new=new, backend=backend)
            yield backend, served._asdict(), functools.partial(_attend, backend=backend)
    if _is_one_full_block(shape):
        yield "cudnn", {"backend": "cudnn", "plan": {}}, _cudnn


def _is_one_full_block(shape: Shape) -> bool:
    """Whether it is what attention without a mask computes, as others have it."""
    return len(shape.capacities) == 1 and not shape.new


def _attend(
    queries: Array, blocks: tuple[CacheBlock, ...], new: Any, *, backend: Any
) -> Float[Array, "batch rows heads head_dim"]:
    return decode_attention(queries, blocks, new=new, backend=backend)[0]


def _cudnn(
    queries: Array, blocks: tuple[CacheBlock, ...], _: Any
) -> Float[Array, "batch rows heads head_dim"]:
    (block,) = blocks
    return jax.nn.dot_product_attention(queries, block.keys, block.values, implementation="cudnn")


def _measure(program: Program, size: int, flops: int, reference: float) -> dict[str, Any]:
    return _rates(program.times, size, flops, reference)


def _rates(times: Sequence[float], size: int, flops: int, reference: float) -> dict[str, Any]:
    speed = size / statistics.median(times)
    return {
        "microseconds": round(1e6 * statistics.median(times), 2),
        "fastest_microseconds": round(1e6 * min(times), 2),
        "slowest_microseconds": round(1e6 * max(times), 2),
        "repeats": len(times),
        "bytes_per_second": round(speed),
        "share": round(speed / reference, 4),
        "tflops_per_second": round(flops / statistics.median(times) / 1e12, 1),
    }


HEADER = (
    f"{'shape':17}{'implementation':15}{'us':>10}{'x cuDNN':>9}{'x flex':>8}{'TB/s':>8}{'share':>8}"
    f"{'TFLOP/s':>9}{'executed / needed':>19}"
)


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`; shares are of a copy's bytes a second."""
    text = f"{row['shape']:17}{label(row):15}"
    if "error" in row:
        return f"{text} {row['error']}"
    speed = row["bytes_per_second"] / 1e12
    times, over_flex = (
        "" if row[field] is None else f"{row[field]:.2f}"
        for field in ("speedup", "speedup_over_flex")
    )
    text += f"{row['microseconds']:10.1f}{times:>9}{over_flex:>8}{speed:8.2f}{row['share']:8.1%}"
    spent = row["executed_flops"]
    ratio = "" if spent is None else f"{spent / row['needed_flops']:.2f}"
    return f"{text}{row['tflops_per_second']:9.1f}{ratio:>19}"
