"""The calls of `decode_attention` that `attention.py` checks.

All that a backend's `TESTED` promises has a case here, as tests/kernels/test_gpu_checks.py asserts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from seqeff_kernels import tuning
from seqeff_kernels.decode_attention import CacheBlock, decode_attention, explain, mosaic, triton
from seqeff_kernels.decode_attention.plan import Plan

Inputs = tuple[Array, list[CacheBlock], tuple[Array, Array] | None]


@dataclass(frozen=True)
class DecodeCase:
    """A backend of `decode_attention` and the sizes of a call.

    Attributes:
      capacities: of the cache blocks. Of each, the first row of a batch has all filled and the
        second nothing, the others, or a single one, a random number; NaN lies beyond.
      own_queries: whether each block has its own.
      new: whether the rows bring entries.
      plan: replaces what the backend would choose.
    """

    backend: str
    head_dim: int
    heads: int
    kv_heads: int
    rows: int = 1
    dtype: str = "bfloat16"
    batch: int = 3
    capacities: tuple[int, ...] = (1000, 336)
    own_queries: bool = False
    new: bool = True
    plan: Plan | mosaic.Plan | None = None

    deterministic = None  # all results have the same bits every time

    def on(self, backend: str) -> DecodeCase:
        """The same for another backend, with the plan that it chooses."""
        return dataclasses.replace(self, backend=backend, plan=None)

    def describe(self) -> dict[str, Any]:
        """The case, for the report."""
        fields = dataclasses.asdict(self)
        if self.plan is None:
            del fields["plan"]
        return {"backend": fields.pop("backend"), "case": "decoding", **fields}

    def inputs(self, changed: bool = False) -> Inputs:
        """Queries, blocks and new entries; with `changed`, other new rows after the first ones.

        Nor is it NaN then that lies beyond what is filled.
        """
        generator = np.random.default_rng(self.head_dim)

        def random(count: int, heads: int) -> Array:
            size = self.batch, count, heads, self.head_dim
            return jnp.asarray(generator.standard_normal(size, np.float32), self.dtype)

        def newest(heads: int) -> Array:
            found = random(self.rows, heads)
            return found.at[:, (self.rows + 1) // 2 :].multiply(-1) if changed else found

        queries = newest(self.heads)
        blocks = []
        for capacity in self.capacities:
            filled = generator.integers(1, capacity, self.batch)
            if self.batch > 1:
                filled[:2] = capacity, 0
            beyond = (np.arange(capacity) >= filled[:, None])[..., None, None]
            keys, values = (
                jnp.where(beyond, 7.0 if changed else jnp.nan, random(capacity, self.kv_heads))
                for _ in range(2)
            )
            own = newest(self.heads) if self.own_queries else None
            blocks.append(CacheBlock(keys, values, jnp.asarray(filled, jnp.int32), own))
        new = newest(self.kv_heads), newest(self.kv_heads)
        return queries, blocks, new if self.new else None

    def unchanged_rows(self, inputs: Inputs) -> int:
        """How many rows, from the first, may not notice what `changed` changes."""
        del inputs
        return (self.rows + 1) // 2

    def explain(self, inputs: Any) -> str:
        """'available', or why the backend cannot serve."""
        queries, blocks, new = inputs
        return explain(queries, blocks, new=new)[self.backend]

    @property
    def is_long(self) -> bool:
        """Whether there are too many entries for the reference, which repeats them for a group."""
        return sum(self.capacities) > 2000

    def run(
        self, backend: Any, arrays: Sequence[Array], restore: Callable[..., Inputs]
    ) -> list[Array]:
        """Output and logsumexp of the inputs that `restore` makes of the arrays."""
        queries, blocks, new = restore(arrays)
        if self.plan is None or backend != self.backend:
            return list(decode_attention(queries, blocks, new=new, backend=backend))
        attend: Any = {"mosaic": mosaic.attend, "triton": triton.attend}[backend]
        return list(attend(queries, tuple(blocks), new, self.head_dim**-0.5, self.plan))


def tuned_cases() -> list[DecodeCase]:
    """Every plan of decoding in the package's tables, in a call that its key describes."""
    makers: dict[str, Callable[..., Any]] = {"mosaic": mosaic.Plan, "triton": Plan}
    pattern = re.compile(
        r"(\w+) head_dim=(\d+) kv_heads=(\d+) points=(\d+) lists=(\d+) entries=(\d+)"
    )
    cases = []
    for path in sorted(tuning.FOLDER.glob("*.json")):
        for backend, make in makers.items():
            for key, entry in tuning.read(path).get("decode", {}).get(backend, {}).items():
                listed = pattern.fullmatch(key)
                if listed is None:
                    raise ValueError(f"{path} lists {key!r}, which is no key of decoding")
                head_dim, kv_heads, points, lists, entries = map(int, listed.groups()[1:])
                case = DecodeCase(
                    backend,
                    head_dim,
                    points * kv_heads,
                    kv_heads,
                    dtype=listed[1],
                    batch=max(1, lists // kv_heads),
                    capacities=(entries,),
                    new=False,
                    plan=make(**entry["plan"]),
                )
                cases.append(case)
    # devices may share a plan
    return list(dict.fromkeys(cases))


# more KV heads in the batch than two for every multiprocessor
_MANY_LISTS: dict[str, Any] = {"batch": 40, "capacities": (200, 72), "own_queries": True}
_LONGEST: dict[str, Any] = {"batch": 1, "capacities": (65536,)}
_LONG_BATCH: dict[str, Any] = {"batch": 64, "capacities": (4096,)}

DECODE_CASES = (
    *(
        DecodeCase("xla", *sizes)
        for sizes in ((64, 12, 12, 2, "float16"), (128, 32, 8, 1, "bfloat16"))
    ),
    *(
        DecodeCase("triton", *sizes, capacities=(1000, 333))
        for sizes in (
            (64, 12, 12, 2, "float16"),
            (64, 8, 1, 1, "bfloat16"),
            (80, 8, 2, 1, "bfloat16"),
            (80, 4, 1, 3, "float16"),
            (96, 4, 4, 3, "float16"),
            (96, 8, 2, 1, "bfloat16"),
            (128, 32, 32, 1, "bfloat16"),
            (128, 32, 8, 4, "bfloat16"),
            (128, 16, 1, 1, "float16"),
            (256, 64, 1, 1, "bfloat16"),
            (256, 64, 1, 2, "float16"),
        )
    ),
    DecodeCase("triton", 128, 32, 8, **_MANY_LISTS),
    DecodeCase("triton", 64, 12, 12, 2, capacities=(3, 333, 65), own_queries=True),
    DecodeCase("triton", 64, 4, 2, 1, "float16", **_LONGEST),
    DecodeCase("triton", 128, 8, 2, 2, "bfloat16", **_LONG_BATCH),
    # the copy engine takes multiples of 8
    *(
        DecodeCase("mosaic", *sizes)
        for sizes in (
            (64, 32, 1, 1, "float16"),
            (64, 16, 2, 3, "bfloat16"),
            (128, 64, 2, 2, "bfloat16"),
            (128, 32, 1, 1, "float16"),
            (256, 64, 1, 1, "bfloat16"),
            (256, 64, 1, 3, "float16"),
        )
    ),
    DecodeCase("mosaic", 128, 32, 8, **_MANY_LISTS),
    # three lists at most, so no new entries: a row of the batch attends nothing
    DecodeCase("mosaic", 64, 64, 1, 2, capacities=(8, 336, 64), own_queries=True, new=False),
    DecodeCase("mosaic", 256, 64, 1, 1, "float16", **_LONGEST),
    DecodeCase("mosaic", 128, 8, 2, 2, "bfloat16", **_LONG_BATCH),
    *tuned_cases(),
)
