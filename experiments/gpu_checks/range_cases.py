"""The calls of `range_attention` that `attention.py` checks; their inputs are `range_inputs.py`'s.

All that a backend's `TESTED` promises has a case here, as tests/kernels/test_gpu_checks.py asserts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from range_inputs import (
    Inputs,
    dense,
    documents,
    many_blocks,
    named,
    random_bounds,
    separators,
    tuned,
    unattended_separators,
)

from seqeff_kernels import tuning
from seqeff_kernels.range_attention import explain, mosaic, range_attention, triton


@dataclass(frozen=True)
class RangeCase:
    """A backend of `range_attention` and the inputs of a call.

    Attributes:
      make: gives the inputs, from the head size, the dtype and `settings`.
      head_dim: or the name of a shape.
      plan: replaces what the backend would choose.
      logsumexp: whether the loss, whose gradients are compared, takes it as well as the output.
        With it, the gradients of the cuDNN backend are the portable form's.
    """

    backend: str
    make: Callable[..., Inputs]
    head_dim: int | str
    dtype: str = "bfloat16"
    settings: dict[str, Any] = field(default_factory=dict)
    plan: mosaic.Tiles | triton.Plan | None = None
    logsumexp: bool = True

    def on(self, backend: str) -> RangeCase:
        """The same for another backend, with the plan that it chooses."""
        return dataclasses.replace(self, backend=backend, plan=None)

    def describe(self) -> dict[str, Any]:
        """The case, for the report."""
        size = "shape" if isinstance(self.head_dim, str) else "head_dim"
        described = {"backend": self.backend, "case": self.make.__name__, **self.settings}
        described |= {size: self.head_dim, "dtype": self.dtype}
        if not self.logsumexp:
            described["loss"] = "of the output alone"
        return (
            described if self.plan is None else described | {"plan": dataclasses.asdict(self.plan)}
        )

    def inputs(self, changed: bool = False) -> Inputs:
        """Queries and sources; with `changed`, of other later tokens."""
        return self.make(
            self.head_dim, self.dtype, **self.settings, **({"changed": True} if changed else {})
        )

    def unchanged_rows(self, inputs: Inputs) -> int:
        """How many rows, from the first, may not notice that later tokens are changed."""
        return 0 if self.make is random_bounds else (inputs[0].shape[1] + 1) // 2

    def explain(self, inputs: Any) -> str:
        """'available', or why the backend cannot serve."""
        return explain(*inputs)[self.backend]

    @property
    def is_long(self) -> bool:
        """Whether there are too many rows for the reference."""
        return self.settings.get("length", 0) > 2000

    @property
    def deterministic(self) -> int | None:
        """How many of the results have the same bits every time; None: all."""
        return 2 if self.backend == "cudnn" else None

    def run(
        self, backend: Any, arrays: Sequence[Array], restore: Callable[..., Inputs]
    ) -> list[Array]:
        """Output, logsumexp, and the gradients of all arrays, of which `restore` makes inputs."""

        def loss(arrays):
            queries, sources = restore(arrays)
            if self.plan is None or backend != self.backend:
                output, logsumexp = range_attention(queries, sources, backend=backend)
            else:
                attend = {"mosaic": mosaic.attend, "triton": triton.attend}[backend]
                scale = queries.shape[-1] ** -0.5
                output, logsumexp = attend(queries, tuple(sources), scale, self.plan)
            weights = jax.random.normal(jax.random.key(3), output.shape, jnp.float32)
            total = (output.astype(jnp.float32) * weights).sum()
            if self.logsumexp:
                total += jnp.where(jnp.isneginf(logsumexp), 0, jnp.sin(logsumexp)).sum()
            return total, (output, logsumexp)

        gradients, outputs = jax.grad(loss, has_aux=True, allow_int=True)(arrays)
        leaves = jax.tree.leaves((outputs, gradients))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def tuned_cases() -> list[RangeCase]:
    """Every plan of attention in the package's tables, once for each kind of call that lists it.

    Rows are those of the longest call, up to 32,768 (8,192 where a row attends all before it), less
    some, so that they fill no tile.
    """
    makers: dict[str, Callable[[dict[str, Any]], mosaic.Tiles | triton.Plan]] = {
        "mosaic": lambda plan: mosaic.Tiles(**plan),
        "triton": lambda plan: triton.Plan(
            **{kernel: triton.Tiles(**sizes) for kernel, sizes in plan.items()}
        ),
    }
    cases: dict[Any, RangeCase] = {}
    for path in sorted(tuning.FOLDER.glob("*.json")):
        table = tuning.read(path).get("attention", {})
        for backend, make in makers.items():
            for key, entry in table.get(backend, {}).items():
                listed = re.fullmatch(r"(\w+) head_dim=(\d+) group=(\d+) (.+) rows=(\d+)", key)
                if listed is None:
                    raise ValueError(f"{path} lists {key!r}, which is no key of attention")
                dtype, head_dim, group, kinds, rows = listed.groups()
                plan, most = make(entry["plan"]), 8192 if kinds == "causal" else 32768
                length = min(int(rows), most) - 23
                # neither a window's width nor the heads of a group change the program much
                same = (backend, plan, dtype, head_dim, re.sub(r"\d+", "", kinds))
                settings = {"group": int(group), "kinds": kinds, "length": length}
                case = RangeCase(backend, tuned, int(head_dim), dtype, settings, plan)
                if same not in cases or cases[same].settings["length"] < length:
                    cases[same] = case
    return list(cases.values())


_SIZES = (64, 80, 96, 128, 256)
# more blocks of rows, and of entries, than two for every multiprocessor
_MANY_DOCUMENTS = {"batch": 4, "heads": 16}
_MANY_BOUNDS = {"batch": 4, "heads": 32, "kv_heads": 16}


def _long(length: int, window: int | None = 64) -> dict[str, Any]:
    return {"length": length, "window": window, "heads": 4}


_XLA = (
    *(
        RangeCase("xla", make, head_dim, dtype)
        for make in (separators, unattended_separators, documents)
        for head_dim, dtype in ((64, "bfloat16"), (128, "float16"))
    ),
    RangeCase("xla", random_bounds, 80, settings={"own_queries": 3}),
    RangeCase("xla", dense, 256, settings={"window": None}),
)

_CUDNN = (
    *(
        RangeCase("cudnn", dense, head_dim, dtype, {"window": window}, logsumexp=False)
        for head_dim in _SIZES
        for dtype in ("bfloat16", "float16")
        for window in (None, 256)
    ),
    RangeCase("cudnn", dense, 128, settings={"window": None}),
    RangeCase("cudnn", dense, 64, "float16", {"window": 256}),
    *(
        RangeCase("cudnn", dense, head_dim, dtype, _long(length, window), logsumexp=False)
        for head_dim, dtype, length, window in (
            (128, "bfloat16", 8192, None),
            (64, "float16", 8192, None),
            (64, "bfloat16", 32768, None),
            (128, "bfloat16", 32768, 256),
            (128, "bfloat16", 131072, 256),
        )
    ),
)

_BOTH = (
    RangeCase(backend, make, head_dim, dtype, settings)
    for backend in ("mosaic", "triton")
    for make, head_dim, dtype, settings in (
        *(
            (make, head_dim, "bfloat16", {})
            for make in (separators, unattended_separators, documents, many_blocks)
            for head_dim in (64, 128)
        ),
        (separators, 64, "float16", {}),
        (documents, 128, "float16", {}),
        # whole blocks of rows are empty
        (documents, 128, "bfloat16", {"padding": 450}),
        (documents, 64, "bfloat16", _MANY_DOCUMENTS),
        (random_bounds, 128, "bfloat16", _MANY_BOUNDS),
        (random_bounds, 64, "bfloat16", {"own_queries": 3}),
        (random_bounds, 128, "bfloat16", {"own_queries": 3}),
        (separators, 128, "bfloat16", {"kv_heads": 1}),
        (separators, 128, "float16", {"kv_heads": 1}),
    )
)

_RANDOM = (
    RangeCase(backend, random_bounds, head_dim, dtype, {"seed": seed})
    for backend, sizes in (("mosaic", (64, 128)), ("triton", _SIZES))
    for head_dim in sizes
    for seed, dtype in enumerate(("bfloat16", "float16", "bfloat16"))
)

_MOSAIC = (
    *(
        RangeCase("mosaic", dense, d, settings={"window": w})
        for d in (64, 128)
        for w in (None, 256)
    ),
    *(
        RangeCase("mosaic", separators, d, dtype, {"length": length, "window": 20})
        for d, dtype in ((64, "float16"), (128, "bfloat16"))
        for length in (1, 63, 130)
    ),
    # the table lists other plans for these
    *(
        RangeCase("mosaic", make, d, dtype, _long(length, window), mosaic.Tiles())
        for make, d, dtype, length, window in (
            (separators, 64, "bfloat16", 8192, 64),
            (separators, 128, "float16", 8192, 64),
            (separators, 64, "float16", 32768, 64),
            (separators, 128, "bfloat16", 32768, 256),
            (separators, 128, "bfloat16", 131072, 64),
            (dense, 64, "bfloat16", 8192, None),
            (dense, 128, "bfloat16", 32768, 256),
        )
    ),
)

_TRITON = (
    *(
        RangeCase("triton", make, head_dim, dtype)
        for make, dtype in (
            (separators, "bfloat16"),
            (documents, "bfloat16"),
            (documents, "float16"),
        )
        for head_dim in (80, 96, 256)
    ),
    *(RangeCase("triton", named, shape) for shape in ("odd", "multi-query")),
    RangeCase("triton", separators, 64, "float32"),
    RangeCase("triton", separators, 64, settings={"length": 1}),
    *(
        RangeCase("triton", make, d, dtype, _long(length, window), triton.plan(d, dtype))
        for make, d, dtype, length, window in (
            (separators, 64, "bfloat16", 8192, 64),
            (separators, 256, "float16", 8192, 64),
            (separators, 80, "bfloat16", 32768, 64),
            (separators, 128, "bfloat16", 32768, 256),
            (separators, 64, "bfloat16", 131072, 64),
            (dense, 128, "float16", 8192, None),
        )
    ),
)

RANGE_CASES = (*_XLA, *_CUDNN, *_BOTH, *_RANDOM, *_MOSAIC, *_TRITON, *tuned_cases())
