"""What `attention.py` compares with the reference: inputs, and the calls made on them.

Inputs are small and adversarial: odd lengths, empty rows, NaN wherever nothing is attended.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from seqeff_kernels import tuning
from seqeff_kernels.decode_attention import CacheBlock, decode_attention
from seqeff_kernels.decode_attention import explain as explain_decoding
from seqeff_kernels.range_attention import (
    RangeSource,
    Source,
    TokenSource,
    explain,
    mosaic,
    range_attention,
    shapes,
    triton,
)

Inputs = tuple[Array, Sequence[Source]]


def dense(head_dim: int, dtype: str, window: int | None) -> Inputs:
    """Causal attention, whole or in a window; grouped heads."""
    queries, keys, values, _ = _tokens(2, 778, 6, 2, head_dim, dtype)
    return queries, [TokenSource(keys, values, window=window)]


def separators(head_dim: int, dtype: str, kv_heads: int = 2) -> Inputs:
    """Packed initial tokens and separators, and a window; an odd length, grouped heads."""
    queries, keys, values, chosen = _tokens(2, 1000, 8, kv_heads, head_dim, dtype)
    return queries, shapes.separator_sources(keys, values, chosen, 63)


def unattended_separators(head_dim: int, dtype: str) -> Inputs:
    """Packed tokens that no row attends, more than a tile of them: all of the last window.

    What a kernel writes as their packed gradients is added to the tokens' gradients, and must be 0
    as the reference's is. A kernel that leaves it unwritten finds NaN in that memory.
    """
    window = 300
    queries, keys, values, chosen = _tokens(2, 1000, 4, 2, head_dim, dtype)
    # the other row of the batch has fewer packed tokens, by tiles
    chosen = chosen.at[0, -window:].set(True)
    return queries, shapes.separator_sources(keys, values, chosen, window)


def many_blocks(head_dim: int, dtype: str) -> Inputs:
    """Several blocks of rows for every multiprocessor, so that a program does one after another."""
    queries, keys, values, chosen = _tokens(4, 1500, 16, 8, head_dim, dtype)
    return queries, shapes.separator_sources(keys, values, chosen, 200)


def named(shape: str, dtype: str) -> Inputs:
    """A small one of the named shapes."""
    sizes = shapes.SHAPES[shape]
    queries, keys, values, chosen = shapes.tokens(sizes, dtype=dtype)
    return queries, shapes.separator_sources(keys, values, chosen, sizes.window)


def documents(
    head_dim: int, dtype: str, padding: int = 100, batch: int = 2, heads: int = 4
) -> Inputs:
    """Separators with packed documents, the first row padded on the left with NaN."""
    length = 777
    queries, keys, values, chosen = _tokens(batch, length, heads, heads, head_dim, dtype)
    starts = np.repeat([[0, 150, 400, 401]], batch, 0)
    starts[0, 0] = padding
    token = np.arange(length)
    start = np.max(np.where(starts[..., None] <= token, starts[..., None], 0), axis=1)
    start[0, :padding] = padding
    real = jnp.asarray(token >= np.eye(batch, 1, dtype=int) * padding)
    keys, values = (jnp.where(real[..., None, None], x, jnp.nan) for x in (keys, values))
    return queries, shapes.separator_sources(
        keys, values, chosen & real, 100, jnp.asarray(start, jnp.int32)
    )


def random_bounds(
    head_dim: int,
    dtype: str,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    own_queries: int = 1,
) -> Inputs:
    """Three sources of random bounds, some with their own queries; empty rows; NaN in no range."""
    rows, entries = 700, 515
    queries, keys, values, _ = _tokens(batch, rows, heads, kv_heads, head_dim, dtype)
    generator = np.random.default_rng(head_dim)
    sources: list[Source] = []
    for index, lines in enumerate(((batch, kv_heads, rows), (batch, rows))):
        start, end = np.sort(generator.integers(0, entries, (2, *lines)), axis=-1)
        entry = np.arange(entries)[:, None]
        attended = ((start[..., None, :] <= entry) & (entry < end[..., None, :])).any(-1)
        attended = attended.swapaxes(1, 2) if index == 0 else attended[..., None]
        far_keys, far_values = (
            jnp.where(attended[..., None], x[:, :entries], jnp.nan) for x in (values, keys)
        )
        sources.append(RangeSource(far_keys, far_values, jnp.asarray(start), jnp.asarray(end)))
    sources.append(TokenSource(keys, values, window=33, row_offset=-300))
    for index in range(own_queries):
        own = jnp.roll(queries[:, ::-1], index, axis=1)
        sources[index] = dataclasses.replace(sources[index], queries=own)
    return queries, sources


def tuned(head_dim: int, dtype: str, group: int, kinds: str) -> Inputs:
    """Sources of the kinds that a key of a table of tuned plans names; an odd length.

    Raises:
      ValueError: the kinds are none that `seqeff_kernels.tune` writes.
    """
    queries, keys, values, chosen = _tokens(2, 1001, 2 * group, 2, head_dim, dtype)
    width = re.search(r"window(\d+)", kinds)
    window = int(width[1]) if width else None
    sources: Sequence[Source] = [TokenSource(keys, values, window=window)]
    if "packed" in kinds and window is not None:
        sources = shapes.separator_sources(keys, values, chosen, window)
    found = tuning.attention_key(queries, sources)
    if f" {kinds} " not in found:
        raise ValueError(f"there are no inputs of {kinds!r} here; the nearest are {found!r}")
    return queries, sources


@dataclass(frozen=True)
class RangeCase:
    """A backend of `range_attention` and the inputs of a call.

    Attributes:
      make: gives the inputs, from the head size, the dtype and `settings`.
      head_dim: or the name of a shape.
      plan: replaces what the backend would choose.
    """

    backend: str
    make: Callable[..., Inputs]
    head_dim: int | str
    dtype: str = "bfloat16"
    settings: dict[str, Any] = field(default_factory=dict)
    plan: mosaic.Tiles | triton.Plan | None = None

    def on(self, backend: str) -> RangeCase:
        """The same for another backend, with the plan that it chooses."""
        return dataclasses.replace(self, backend=backend, plan=None)

    def describe(self) -> dict[str, Any]:
        """The case, for the report."""
        size = "shape" if isinstance(self.head_dim, str) else "head_dim"
        described = {"backend": self.backend, "case": self.make.__name__, **self.settings}
        described |= {size: self.head_dim, "dtype": self.dtype}
        return (
            described if self.plan is None else described | {"plan": dataclasses.asdict(self.plan)}
        )

    def inputs(self) -> Inputs:
        """Queries and sources."""
        return self.make(self.head_dim, self.dtype, **self.settings)

    def explain(self, inputs: Any) -> str:
        """'available', or why the backend cannot serve."""
        return explain(*inputs)[self.backend]

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
            finite = jnp.where(jnp.isneginf(logsumexp), 0, jnp.sin(logsumexp))
            return (output.astype(jnp.float32) * weights).sum() + finite.sum(), (output, logsumexp)

        gradients, outputs = jax.grad(loss, has_aux=True, allow_int=True)(arrays)
        leaves = jax.tree.leaves((outputs, gradients))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


@dataclass(frozen=True)
class DecodeCase:
    """A backend of `decode_attention` and the sizes of a call.

    Attributes:
      capacities: of the cache blocks. Of each, the first row of the batch has all filled and the
        second nothing, the others a random number; NaN lies beyond.
      own_queries: whether each block has its own.
      new: whether the rows bring entries.
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

    def on(self, backend: str) -> DecodeCase:
        """The same for another backend."""
        return dataclasses.replace(self, backend=backend)

    def describe(self) -> dict[str, Any]:
        """The case, for the report."""
        fields = dataclasses.asdict(self)
        return {"backend": fields.pop("backend"), "case": "decoding", **fields}

    def inputs(self) -> tuple[Array, list[CacheBlock], tuple[Array, Array] | None]:
        """Queries, blocks and new entries."""
        generator = np.random.default_rng(self.head_dim)

        def random(count: int, heads: int) -> Array:
            size = self.batch, count, heads, self.head_dim
            return jnp.asarray(generator.standard_normal(size, np.float32), self.dtype)

        queries = random(self.rows, self.heads)
        blocks = []
        for capacity in self.capacities:
            filled = generator.integers(1, capacity, self.batch)
            filled[:2] = capacity, 0
            beyond = (np.arange(capacity) >= filled[:, None])[..., None, None]
            keys, values = (
                jnp.where(beyond, jnp.nan, random(capacity, self.kv_heads)) for _ in range(2)
            )
            own = random(self.rows, self.heads) if self.own_queries else None
            blocks.append(CacheBlock(keys, values, jnp.asarray(filled, jnp.int32), own))
        new = random(self.rows, self.kv_heads), random(self.rows, self.kv_heads)
        return queries, blocks, new if self.new else None

    def explain(self, inputs: Any) -> str:
        """'available', or why the backend cannot serve."""
        queries, blocks, new = inputs
        return explain_decoding(queries, blocks, new=new)[self.backend]

    def run(
        self, backend: Any, arrays: Sequence[Array], restore: Callable[..., tuple]
    ) -> list[Array]:
        """Output and logsumexp of the inputs that `restore` makes of the arrays."""
        queries, blocks, new = restore(arrays)
        return list(decode_attention(queries, blocks, new=new, backend=backend))


def tuned_cases() -> list[RangeCase]:
    """Every plan of attention in the package's tables, once for each kind of call that lists it."""
    makers: dict[str, Callable[[dict[str, Any]], mosaic.Tiles | triton.Plan]] = {
        "mosaic": lambda plan: mosaic.Tiles(**plan),
        "triton": lambda plan: triton.Plan(
            **{kernel: triton.Tiles(**sizes) for kernel, sizes in plan.items()}
        ),
    }
    cases = {}
    for path in sorted(tuning.FOLDER.glob("*.json")):
        table = tuning.read(path).get("attention", {})
        for backend, make in makers.items():
            for key, entry in table.get(backend, {}).items():
                listed = re.fullmatch(r"(\w+) head_dim=(\d+) group=(\d+) (.+) rows=\d+", key)
                if listed is None:
                    raise ValueError(f"{path} lists {key!r}, which is no key of attention")
                dtype, head_dim, group, kinds = listed.groups()
                plan = make(entry["plan"])
                # neither a window's width nor the heads of a group change the program much
                same = (backend, plan, dtype, head_dim, re.sub(r"\d+", "", kinds))
                settings = {"group": int(group), "kinds": kinds}
                case = RangeCase(backend, tuned, int(head_dim), dtype, settings, plan)
                cases.setdefault(same, case)
    return list(cases.values())


def _tokens(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str):
    shape = shapes.Shape(
        batch=batch, length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, density=0.2
    )
    return shapes.tokens(shape, seed=head_dim, dtype=dtype)


# more blocks of rows, and of entries, than two for every multiprocessor
_MANY_DOCUMENTS = {"batch": 4, "heads": 16}
_MANY_BOUNDS = {"batch": 4, "heads": 32, "kv_heads": 16}

RANGE_CASES = (
    *(
        RangeCase("cudnn", dense, d, settings={"window": w})
        for d in (64, 80, 96, 128, 256)
        for w in (None, 256)
    ),
    RangeCase("cudnn", dense, 128, "float16", {"window": None}),
    *(
        RangeCase(backend, make, head_dim)
        for backend in ("mosaic", "triton")
        for make in (separators, unattended_separators, documents, random_bounds, many_blocks)
        for head_dim in (64, 128)
    ),
    *(
        RangeCase(backend, make, head_dim, settings=settings)
        for backend in ("mosaic", "triton")
        for make, head_dim, settings in (
            # whole blocks of rows are empty
            (documents, 128, {"padding": 450}),
            (documents, 64, _MANY_DOCUMENTS),
            (random_bounds, 128, _MANY_BOUNDS),
            (random_bounds, 64, {"own_queries": 3}),
            (random_bounds, 128, {"own_queries": 3}),
            (separators, 128, {"kv_heads": 1}),
        )
    ),
    *(
        RangeCase("triton", make, head_dim)
        for make in (separators, documents, random_bounds)
        for head_dim in (80, 96, 256)
    ),
    *(RangeCase(b, random_bounds, d, "float16") for b in ("mosaic", "triton") for d in (64, 128)),
    *(RangeCase("triton", documents, d, "float16") for d in (80, 96, 256)),
    *(RangeCase("triton", named, shape) for shape in ("odd", "multi-query")),
    RangeCase("triton", separators, 64, "float32"),
    *(
        RangeCase("mosaic", dense, d, settings={"window": w})
        for d in (64, 128)
        for w in (None, 256)
    ),
    *tuned_cases(),
)

# more KV heads in the batch than two for every multiprocessor
_MANY_LISTS: dict[str, Any] = {"batch": 40, "capacities": (200, 72), "own_queries": True}

DECODE_CASES = (
    *(
        DecodeCase("triton", *sizes, capacities=(1000, 333))
        for sizes in (
            (128, 32, 32, 1, "bfloat16"),
            (128, 32, 8, 4, "bfloat16"),
            (256, 64, 1, 1, "bfloat16"),
            (64, 12, 12, 2, "float16"),
            (80, 8, 2, 1, "bfloat16"),
            (96, 4, 4, 3, "float16"),
        )
    ),
    DecodeCase("triton", 128, 32, 8, **_MANY_LISTS),
    DecodeCase("triton", 64, 12, 12, 2, capacities=(3, 333, 65), own_queries=True),
    # the copy engine takes multiples of 8
    *(
        DecodeCase("mosaic", *sizes)
        for sizes in (
            (256, 64, 1, 1, "bfloat16"),
            (256, 64, 1, 3, "float16"),
            (128, 64, 2, 2, "bfloat16"),
            (64, 32, 1, 1, "float16"),
        )
    ),
    DecodeCase("mosaic", 128, 32, 8, **_MANY_LISTS),
    # three lists at most, so no new entries: a row of the batch attends nothing
    DecodeCase("mosaic", 64, 64, 1, 2, capacities=(8, 336, 64), own_queries=True, new=False),
)
