"""Time of separator attention, forward and with all gradients, against cuDNN's dense causal one."""

from __future__ import annotations

import functools
import math
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from seqeff.bench import torch_attention
from seqeff.bench.report import attempt, chosen_shapes
from seqeff_kernels.range_attention import (
    Cost,
    PackedIndices,
    RangeSource,
    TokenSource,
    cost,
    explain,
    range_attention,
)
from seqeff_kernels.range_attention.operands import gathered, operands
from seqeff_kernels.range_attention.shapes import SHAPES, Shape, separator_sources, tokens
from seqeff_kernels.timing import device_times

DEFAULT_SHAPES = ("wide-2k", "wide-8k", "wide-32k", "wide-128k")
DEFAULT_WINDOWS = (64,)
# the indices of packed tokens are built once a step, for all layers
INDEX_LAYERS = 12
BASELINE = "cudnn dense"
BACKENDS = ("mosaic", "triton", "auto")
_TILE = 128
_DTYPE = jnp.bfloat16
# queries, keys and values of all sets: over four times an H200's L2 cache
_ROTATED_BYTES = 1 << 28
# of a loop, and a speed that makes it no shorter
_SECONDS = 0.1
_FLOPS_PER_SECOND = 7e14
_MOST_ITERATIONS = 2_000
# loops that compile at a time, while one runs
_COMPILING = 8

Indices = tuple[PackedIndices, Int[Array, "batch length"], Int[Array, "batch length"]]


def benchmark_attention(
    names: Sequence[str] = (),
    windows: Sequence[int] = DEFAULT_WINDOWS,
    *,
    backends: Sequence[str] = BACKENDS,
    rivals: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields one row for each shape, window and implementation, as they are measured.

    A row has the fields of its shape, `implementation`, `window` (None: dense), `deterministic`
    (None: not known), needed and executed FLOPs (tiles of 128 by 128), and under `forward` and
    `forward_and_backward` the median, fastest and slowest milliseconds over the repeats, the
    speed-ups over cuDNN and over FlexAttention with the same window (None: not measured) and the
    TFLOP/s of needed FLOPs. Times with a window hold the gather of the packed tokens (alone:
    `gather_milliseconds`), its transpose, and a twelfth of `index_milliseconds`. An
    implementation that fails has `error` instead.

    Args:
      names: of `seqeff_kernels.range_attention.shapes.SHAPES`; none: the wide ones.
      windows: tokens; each is measured with every shape.
      backends: of `range_attention`; those that cannot serve are left out.
      rivals: measure PyTorch too; `prepare_rivals` comes before the first use of a device.
    """
    chosen = chosen_shapes(names, SHAPES, DEFAULT_SHAPES)
    costs: dict[tuple[str, int | None], Cost] = {}
    for name in chosen:
        shape = SHAPES[name]
        # before our own arrays take their room
        others = list(torch_attention.run(shape, windows)) if rivals else []
        flex = {row["window"]: row for row in others if row["implementation"] == "flex"}
        inputs = _inputs(shape)
        costs[name, None] = _dense_cost(shape)
        with ThreadPoolExecutor(_COMPILING) as pool:
            alone = threading.Lock()
            dense = pool.submit(attempt, _measure, _cudnn, inputs, costs[name, None], alone)
            sparse = [
                (window, backend, pool.submit(attempt, measure))
                for window in windows
                for backend, measure in _separator_calls(
                    name, window, inputs, backends, costs, alone
                )
            ]
            found = dense.result()
            measured: list[tuple[int | None, str, bool | None, Callable[[], dict[str, Any]]]] = [
                (None, BASELINE, False, lambda found=found: found),
                *((window, backend, True, future.result) for window, backend, future in sparse),
                *(
                    (row["window"], row["implementation"], row["deterministic"], row.copy)
                    for row in others
                ),
            ]
            for window, label, mode, result in measured:
                against = {"speedup": found, "speedup_over_flex": flex.get(window, {})}
                yield _row(name, window, label, mode, result(), against, costs[name, window])


def _separator_calls(
    name: str,
    window: int,
    inputs: list[tuple[Array, ...]],
    backends: Sequence[str],
    costs: dict[tuple[str, int | None], Cost],
    alone: threading.Lock,
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What measures each backend that can serve; adds what the call costs to `costs`."""
    index = functools.partial(jax.jit(_indices, static_argnums=1), window=window)
    masks = [(chosen,) for *_, chosen in inputs]
    with alone:
        sets = [(*arrays, index(chosen)) for *arrays, chosen in inputs]
        queries, keys, values, _, indices = sets[0]
        sources = _sources(keys, values, indices, window)
        spent = cost(queries, sources, tile_rows=_TILE, tile_entries=_TILE)
    costs[name, window] = spent
    answers = explain(queries, sources) | {"auto": "available"}

    def gather(queries: Array, keys: Array, values: Array, _: Array, indices: Indices) -> Any:
        listed = operands(queries, _sources(keys, values, indices, window))
        packed = gathered(*listed, finite=True)[0]
        return packed.keys, packed.values

    @functools.cache
    def packing() -> tuple[list[float], list[float]]:
        return (
            device_times(index, masks, alone=lambda: alone),
            device_times(gather, sets, alone=lambda: alone),
        )

    for backend in backends:
        if answers.get(backend) != "available":
            continue
        attend = functools.partial(_separators, window=window, backend=backend)
        yield (
            backend,
            lambda attend=attend: _measure(attend, sets, spent, alone, packing()),
        )


def _inputs(shape: Shape) -> list[tuple[Array, ...]]:
    """Sets of queries, keys, values, the output's cotangent, and which tokens are packed."""
    entries = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    size = shape.batch * shape.length * entries * jnp.dtype(_DTYPE).itemsize
    make = jax.jit(tokens, static_argnums=(0, 2))
    draw = jax.jit(lambda seed, like: jax.random.normal(jax.random.key(seed), like.shape, _DTYPE))
    sets = []
    for seed in range(math.ceil(_ROTATED_BYTES / size)):
        *arrays, chosen = make(shape, seed, _DTYPE)
        sets.append((*arrays, draw(1000 + seed, arrays[0]), chosen))
    return sets


def _indices(chosen: Bool[Array, "batch length"], window: int) -> Indices:
    unread = jnp.zeros((*chosen.shape, 1, 1), _DTYPE)
    far, _ = separator_sources(unread, unread, chosen, window)
    assert far.packed is not None
    return far.packed, far.start, far.end


def _sources(
    keys: Array, values: Array, indices: Indices, window: int
) -> tuple[RangeSource, TokenSource]:
    packed, start, end = indices
    far = RangeSource(keys, values, start, end, packed=packed)
    return far, TokenSource(keys, values, window=window)


def _separators(
    queries: Array, keys: Array, values: Array, indices: Indices, *, window: int, backend: Any
) -> Float[Array, "batch length heads head_dim"]:
    sources = _sources(keys, values, indices, window)
    return range_attention(queries, sources, backend=backend)[0]


def _cudnn(
    queries: Array, keys: Array, values: Array, _: Any
) -> Float[Array, "batch length heads head_dim"]:
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=True, implementation="cudnn"
    )


def _dense_cost(shape: Shape) -> Cost:
    def array(heads: int) -> Any:
        size = (shape.batch, shape.length, heads, shape.head_dim)
        return jax.ShapeDtypeStruct(size, _DTYPE)

    dense = TokenSource(array(shape.kv_heads), array(shape.kv_heads))
    return cost(array(shape.heads), [dense], tile_rows=_TILE, tile_entries=_TILE)


def _measure(
    attend: Callable[..., Array],
    sets: list[tuple[Any, ...]],
    spent: Cost,
    alone: threading.Lock,
    packing: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Times of `attend(queries, keys, values, extra)`; sets hold the cotangent before `extra`."""

    def forward(queries: Array, keys: Array, values: Array, _: Array, extra: Any) -> Array:
        return attend(queries, keys, values, extra)

    def both(queries: Array, keys: Array, values: Array, cotangent: Array, extra: Any) -> Any:
        output, pull = jax.vjp(lambda *arrays: attend(*arrays, extra), queries, keys, values)
        return output, pull(cotangent)

    def times(function: Callable[..., Any], flops: int) -> list[float]:
        most = _SECONDS * _FLOPS_PER_SECOND / (flops * len(sets))
        iterations = min(max(2, round(most)), _MOST_ITERATIONS)
        return device_times(function, sets, iterations=iterations, alone=lambda: alone)

    index, gather = (statistics.median(times) for times in packing or ((0.0,), (0.0,)))
    flops = spent.forward_flops
    found: dict[str, Any] = {
        "forward": _summary(times(forward, flops), index),
        "forward_and_backward": _summary(times(both, flops + spent.backward_flops), index),
    }
    if packing:
        found["index_milliseconds"] = round(1e3 * index, 4)
        found["gather_milliseconds"] = round(1e3 * gather, 4)
    return found


def _summary(times: Sequence[float], index: float) -> dict[str, Any]:
    shared = index / INDEX_LAYERS
    return {
        "milliseconds": round(1e3 * (statistics.median(times) + shared), 4),
        "fastest_milliseconds": round(1e3 * (min(times) + shared), 4),
        "slowest_milliseconds": round(1e3 * (max(times) + shared), 4),
        "repeats": len(times),
    }


def _row(
    name: str,
    window: int | None,
    implementation: str,
    deterministic: bool | None,
    found: dict[str, Any],
    against: dict[str, dict[str, Any]],
    spent: Cost,
) -> dict[str, Any]:
    """A row of the report; `against` names speed-ups and what they are over."""
    shape = SHAPES[name]
    row = {
        "shape": name,
        "window": window,
        "implementation": implementation,
        "deterministic": deterministic,
        "batch": shape.batch,
        "length": shape.length,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "density": shape.density,
        "initial": shape.initial,
        "dtype": jnp.dtype(_DTYPE).name,
        "needed_forward_flops": spent.forward_flops,
        "executed_forward_flops": spent.executed_forward_flops,
        "needed_backward_flops": spent.backward_flops,
        "executed_backward_flops": spent.executed_backward_flops,
    }
    needed = {
        "forward": spent.forward_flops,
        "forward_and_backward": spent.forward_flops + spent.backward_flops,
    }
    for key, value in found.items():
        if key not in needed:
            row[key] = value
            continue
        mine = value["milliseconds"]
        speedups = {
            kind: round(other[key]["milliseconds"] / mine, 3) if key in other else None
            for kind, other in against.items()
        }
        speed = {"tflops_per_second": round(needed[key] / mine / 1e9, 1)}
        row[key] = value | speedups | speed
    return row


_MODES = {True: "yes", False: "no", None: "not known"}
HEADER = (
    f"{'':20}{'':>7}  {'':14}{'forward':>31}{'forward and backward':>32}  executed\n"
    f"{'shape':20}{'window':>7}  {'implementation':14}"
    + f"{'ms':>9}{'x cuDNN':>8}{'x flex':>7}{'TFLOP/s':>8}" * 2
    + "  / needed  deterministic"
)


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`; cuDNN's attention is dense and causal."""
    text = f"{row['shape']:20}{row['window'] or '':>7}  {row['implementation']:14}"
    if "error" in row:
        return f"{text}  {row['error']}"
    for key in ("forward", "forward_and_backward"):
        found = row[key]
        over_cudnn, over_flex = (
            "" if found[kind] is None else f"{found[kind]:.2f}"
            for kind in ("speedup", "speedup_over_flex")
        )
        text += f"{found['milliseconds']:9.3f}{over_cudnn:>8}{over_flex:>7}"
        text += f"{found['tflops_per_second']:8.0f}"
    waste = row["executed_forward_flops"] / row["needed_forward_flops"]
    return f"{text}{waste:10.2f}  {_MODES[row['deterministic']]}"
