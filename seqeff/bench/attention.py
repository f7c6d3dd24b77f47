"""Time of separator attention, forward and with all gradients, against cuDNN's dense causal one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from seqeff.bench import torch_attention
from seqeff.bench.programs import Program, iterations_for, time_all
from seqeff.bench.report import attempt, chosen_shapes, label
from seqeff_kernels.range_attention import (
    Backend,
    Cost,
    Execution,
    RangeSource,
    TokenSource,
    cost,
    cudnn,
    executed_flops,
    execution,
    explain,
    range_attention,
)
from seqeff_kernels.range_attention.operands import gathered, operands, token_gradients
from seqeff_kernels.range_attention.shapes import (
    SHAPES,
    PackedList,
    Shape,
    kind_sources,
    packed_lists,
    tokens,
)

DEFAULT_SHAPES = ("wide-2k", "wide-8k", "wide-32k", "wide-128k")
DEFAULT_WINDOWS = (64,)
DEFAULT_KINDS = ("separators",)
# the indices of packed tokens are built once a step, for all layers
INDEX_LAYERS = 12
BASELINE = "cudnn dense"
BACKENDS = ("mosaic", "triton", "auto")
_DTYPE = jnp.bfloat16
# queries, keys and values of all sets: over four times an H200's L2 cache
_ROTATED_BYTES = 1 << 28
# of a loop, a speed that makes it no shorter, and about what packing takes
_SECONDS = 0.1
_FLOPS_PER_SECOND = 7e14
_PACKING_SECONDS = 1e-4

Lists = tuple[PackedList, ...]


def benchmark_attention(
    names: Sequence[str] = (),
    windows: Sequence[int] = DEFAULT_WINDOWS,
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    backends: Sequence[str] = BACKENDS,
    density: float | None = None,
    rivals: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields one row for each shape, kind, window and implementation, as they are measured.

    A row has the fields of its shape, `implementation`, `kind` and `window` (None: dense), the
    `backend` that served and the fields of its `plan` (None: PyTorch), `deterministic`
    gradients (None: not known), needed FLOPs and those executed, of whole tiles of the plan
    (None: not known), and under `forward` and `forward_and_backward` the median, fastest and
    slowest milliseconds over the repeats, the speed-ups over cuDNN and over FlexAttention with
    the same window (None: not measured) and the TFLOP/s of needed FLOPs. Times with a window
    hold the gather of the packed tokens (alone: `gather_milliseconds`), in the backward pass its
    transpose, which adds to the tokens' gradients in place (`transpose_milliseconds`: what
    negating those takes more with it than without), and a twelfth of `index_milliseconds`. An
    implementation that fails has `error` instead.

    All programs of a shape are compiled before the first of them runs, and then run in turn.

    Args:
      names: of `seqeff_kernels.range_attention.shapes.SHAPES`; none: the wide ones.
      windows: tokens; each is measured with every shape.
      kinds: of attention, of `seqeff_kernels.range_attention.shapes.KINDS` with a window.
      backends: of `range_attention`; those that cannot serve are left out.
      density: of separators, in place of each shape's own; the row's `shape` then ends in it.
      rivals: measure PyTorch too; `prepare_rivals` comes before the first use of a device.
    """
    for name in chosen_shapes(names, SHAPES, DEFAULT_SHAPES):
        shape = SHAPES[name]
        if density is not None:
            name, shape = f"{name}@{density:g}", dataclasses.replace(shape, density=density)
        yield from _benchmark_shape(name, shape, windows, kinds, backends, rivals)


def _benchmark_shape(
    name: str,
    shape: Shape,
    windows: Sequence[int],
    kinds: Sequence[str],
    backends: Sequence[str],
    rivals: bool,
) -> Iterator[dict[str, Any]]:
    # before our own arrays take their room
    others = list(torch_attention.run(shape, windows)) if rivals else []
    flex = {row["window"]: row for row in others if row["implementation"] == "flex"}
    inputs = _inputs(shape)
    baseline = _dense_call(inputs)
    calls = [baseline]
    needed: dict[int | None, Cost] = {None: baseline.needed}
    for kind, window in itertools.product(kinds, windows):
        sets, packing = _packed(inputs, kind, shape.initial, window)
        queries, keys, values, _, lists = sets[0]
        sources = kind_sources(kind, queries, keys, values, lists, window)
        spent = cost(queries, sources)
        if kind == "separators":
            needed[window] = spent
        answers = explain(queries, sources)
        for backend in backends:
            if backend == "auto" or answers[backend] == "available":
                attend = functools.partial(_attend, kind=kind, window=window, backend=backend)
                served = execution(queries, sources, backend=cast(Backend, backend))
                calls.append(
                    _Call(backend, kind, window, attend, sets, sources, served, spent, packing)
                )
    time_all(program for call in calls for program in call.programs)

    dense = attempt(baseline.measure)
    for call in calls:
        found = dense if call is baseline else attempt(call.measure)
        same = flex.get(call.window, {}) if call.kind in (None, "separators") else {}
        against = {"speedup": dense, "speedup_over_flex": same}
        facts = {"kind": call.kind} | call.facts()
        yield _row(
            name, shape, call.window, call.implementation, found, against, call.needed, facts
        )
    for row in others:
        window = row["window"]
        against = {"speedup": dense, "speedup_over_flex": flex.get(window, {})}
        facts = {
            "kind": None if window is None else "separators",
            "backend": None,
            "plan": None,
            "deterministic": row["deterministic"],
            "executed_forward_flops": None,
            "executed_backward_flops": None,
        }
        yield _row(name, shape, window, row["implementation"], row, against, needed[window], facts)


class _Packing(NamedTuple):
    """Programs that build the indices, gather the packed tokens, and negate the tokens' gradients
    without and with the packed ones' added to them.
    """

    index: Program
    gather: Program
    negate: Program
    negate_and_add: Program

    def seconds(self) -> dict[str, float]:
        """What each part of packing takes."""
        index, gather, negate, both = (statistics.median(program.times) for program in self)
        return {"index": index, "gather": gather, "transpose": both - negate}


class _Call:
    """An implementation on sets of arguments, which hold the cotangent before the last.

    Args:
      attend: takes queries, keys, values and the last argument of a set.
      sources: of the first set.
      packing: what packing takes part by part, if there is any.
    """

    def __init__(
        self,
        implementation: str,
        kind: str | None,
        window: int | None,
        attend: Callable[..., Array],
        sets: list[tuple[Any, ...]],
        sources: Sequence[RangeSource | TokenSource],
        served: Execution,
        needed: Cost,
        packing: _Packing | None = None,
    ) -> None:
        self.implementation, self.needed = implementation, needed
        self.kind, self.window = kind, window
        self._queries, self._sources, self._served = sets[0][0], sources, served
        self._packing = packing

        def forward(queries: Array, keys: Array, values: Array, _: Array, extra: Any) -> Array:
            return attend(queries, keys, values, extra)

        def both(queries: Array, keys: Array, values: Array, cotangent: Array, extra: Any) -> Any:
            output, pull = jax.vjp(lambda *arrays: attend(*arrays, extra), queries, keys, values)
            return output, pull(cotangent)

        forward_flops = self.needed.forward_flops
        self._passes = {
            name: Program(
                function,
                sets,
                iterations_for(_SECONDS, len(sets), of_call=flops / _FLOPS_PER_SECOND),
            )
            for name, function, flops in (
                ("forward", forward, forward_flops),
                ("forward_and_backward", both, forward_flops + self.needed.backward_flops),
            )
        }

    @property
    def programs(self) -> list[Program]:
        """All that is timed."""
        return [*(self._packing or ()), *self._passes.values()]

    def measure(self) -> dict[str, Any]:
        """Times of the passes, and of packing."""
        packing = {} if self._packing is None else self._packing.seconds()
        shared = packing.get("index", 0.0) / INDEX_LAYERS
        found = {name: _summary(program.times, shared) for name, program in self._passes.items()}
        return found | {
            f"{part}_milliseconds": round(1e3 * seconds, 4) for part, seconds in packing.items()
        }

    def facts(self) -> dict[str, Any]:
        """What served, and the FLOPs that it executes."""
        served = self._served
        executed = {
            f"executed_{name}_flops": None
            if walks is None
            else executed_flops(self._queries, self._sources, walks)
            for name, walks in (("forward", served.forward), ("backward", served.backward))
        }
        return {
            "backend": served.backend,
            "plan": dict(served.plan),
            "deterministic": served.deterministic,
        } | executed


def _dense_call(inputs: list[tuple[Array, ...]]) -> _Call:
    queries, keys, values, *_ = inputs[0]
    sources = (TokenSource(keys, values),)
    served = cudnn.execution(queries, sources)
    return _Call(BASELINE, None, None, _cudnn, inputs, sources, served, cost(queries, sources))


def _packed(
    inputs: list[tuple[Array, ...]], kind: str, initial: int, window: int
) -> tuple[list[tuple[Any, ...]], _Packing | None]:
    """Sets with packed lists in place of what is chosen; what packing takes."""
    index = jax.jit(lambda chosen: packed_lists(kind, chosen, initial, window))
    sets = [(*arrays, index(chosen)) for *arrays, chosen in inputs]
    if not sets[0][-1]:
        return sets, None

    def gather(queries: Array, keys: Array, values: Array, _: Array, lists: Lists) -> Any:
        sources = kind_sources(kind, queries, keys, values, lists, window)
        packed = gathered(*operands(queries, sources), finite=True)[: len(lists)]
        return [(source.keys, source.values) for source in packed]

    def negate(_: Array, keys: Array, values: Array, *rest: Any) -> tuple[Array, Array]:
        return -keys, -values

    def negate_and_add(queries: Array, keys: Array, values: Array, _: Array, lists: Lists) -> Any:
        made = operands(queries, kind_sources(kind, queries, keys, values, lists, window))
        # there is room to pack every token, so the packed gradients are as large as the tokens'
        gradients = [*((keys, values) for _ in lists), (-keys, -values)]
        return [pair for pair in token_gradients(*made, gradients) if pair[0] is not None]

    iterations = iterations_for(_SECONDS, len(sets), of_call=_PACKING_SECONDS)
    return sets, _Packing(
        Program(index, [(chosen,) for *_, chosen in inputs], iterations),
        *(Program(part, sets, iterations) for part in (gather, negate, negate_and_add)),
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


def _attend(
    queries: Array,
    keys: Array,
    values: Array,
    lists: Lists,
    *,
    kind: str,
    window: int,
    backend: Any,
) -> Float[Array, "batch length heads head_dim"]:
    sources = kind_sources(kind, queries, keys, values, lists, window)
    return range_attention(queries, sources, backend=backend)[0]


def _cudnn(
    queries: Array, keys: Array, values: Array, _: Any
) -> Float[Array, "batch length heads head_dim"]:
    return jax.nn.dot_product_attention(
        queries, keys, values, is_causal=True, implementation="cudnn"
    )


def _summary(times: Sequence[float], shared: float) -> dict[str, Any]:
    """Of the times of a pass; `shared` is its part of what all layers share, in seconds."""
    return {
        "milliseconds": round(1e3 * (statistics.median(times) + shared), 4),
        "fastest_milliseconds": round(1e3 * (min(times) + shared), 4),
        "slowest_milliseconds": round(1e3 * (max(times) + shared), 4),
        "repeats": len(times),
    }


def _row(
    name: str,
    shape: Shape,
    window: int | None,
    implementation: str,
    found: dict[str, Any],
    against: dict[str, dict[str, Any]],
    spent: Cost,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """A row of the report; `against` names speed-ups and what they are over."""
    row = {
        "shape": name,
        "window": window,
        "implementation": implementation,
        "batch": shape.batch,
        "length": shape.length,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "density": shape.density,
        "initial": shape.initial,
        "dtype": jnp.dtype(_DTYPE).name,
        "needed_forward_flops": spent.forward_flops,
        "needed_backward_flops": spent.backward_flops,
    } | facts
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
    f"{'':20}{'':16}{'':>7}  {'':14}{'forward':>31}{'forward and backward':>32}"
    "  executed / needed\n"
    f"{'shape':20}{'kind':16}{'window':>7}  {'implementation':14}"
    + f"{'ms':>9}{'x cuDNN':>8}{'x flex':>7}{'TFLOP/s':>8}" * 2
    + "  forward  backward  deterministic"
)


def line(row: dict[str, Any]) -> str:
    """A row under `HEADER`; cuDNN's attention is dense and causal."""
    text = f"{row['shape']:20}{row['kind'] or '':16}{row['window'] or '':>7}  {label(row):14}"
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
    waste = ""
    for key, width in (("forward", 9), ("backward", 10)):
        executed = row[f"executed_{key}_flops"]
        share = "" if executed is None else f"{executed / row[f'needed_{key}_flops']:.2f}"
        waste += f"{share:>{width}}"
    return f"{text}{waste}  {_MODES[row['deterministic']]}"
