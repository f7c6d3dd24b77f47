"""The calls of `rotate_and_append` that `attention.py` checks.

All that a backend's `TESTED` promises has a case here, as tests/kernels/test_gpu_checks.py asserts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from seqeff_kernels.rotate_and_append import explain, rotate_and_append

Inputs = tuple[Array, Array, Array, Array, tuple[Array, Array] | None]


@dataclass(frozen=True)
class AppendCase:
    """A backend of `rotate_and_append` and the sizes of a call.

    Attributes:
      pairs: that are rotated; 0: nothing is.
    """

    backend: str
    head_dim: int
    heads: int
    kv_heads: int
    dtype: str = "bfloat16"
    batch: int = 3
    rows: int = 1
    capacity: int = 1000
    pairs: int = 8
    interleaved: bool = False

    deterministic = None  # all results have the same bits every time
    is_long = True  # compared with the portable form: it is the reference

    def on(self, backend: str) -> AppendCase:
        """The same for another backend."""
        return dataclasses.replace(self, backend=backend)

    def describe(self) -> dict[str, Any]:
        """The case, for the report."""
        fields = dataclasses.asdict(self)
        return {"backend": fields.pop("backend"), "case": "appending", **fields}

    def inputs(self, changed: bool = False) -> Inputs:
        """Columns, caches, slots and rotation; of each row's tokens the last is not written."""
        del changed
        generator = np.random.default_rng(self.head_dim)

        def random(*size: int) -> Array:
            return jnp.asarray(generator.standard_normal(size, np.float32), self.dtype)

        columns = (self.heads + 2 * self.kv_heads) * self.head_dim + 24
        cache = self.batch, self.capacity, self.kv_heads, self.head_dim
        first = generator.integers(0, self.capacity - self.rows + 1, (self.batch, 1))
        slot = first + np.arange(self.rows)
        slot[::2, -1] = self.capacity
        angles = generator.uniform(0, 6.3, (self.batch, self.rows, self.pairs))
        rotation = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
        return (
            random(self.batch, self.rows, columns),
            random(*cache),
            random(*cache),
            jnp.asarray(slot, jnp.int32),
            rotation if self.pairs else None,
        )

    def unchanged_rows(self, inputs: Inputs) -> int:
        """No token sees another."""
        del inputs
        return 0

    def explain(self, inputs: Any) -> str:
        """'available', or why the backend cannot serve."""
        joined, keys, *_ = inputs
        return explain(joined, keys)[self.backend]

    def run(
        self, backend: Any, arrays: Sequence[Array], restore: Callable[..., Inputs]
    ) -> list[Array]:
        """Queries and both caches of the inputs that `restore` makes of the arrays."""
        joined, *others = restore(arrays)
        # exact in every dtype
        bias = (jnp.arange(joined.shape[2]) % 16 - 8).astype(joined.dtype) / 8
        settings: Any = {"heads": self.heads, "bias": bias, "interleaved": self.interleaved}
        return list(rotate_and_append(joined, *others, **settings, backend=backend))


APPEND_CASES = (
    *(
        AppendCase("triton", head_dim, 4, 2, dtype, pairs=head_dim // 2, interleaved=head_dim > 80)
        for head_dim, dtype in itertools.product((64, 80, 96, 128, 256), ("bfloat16", "float16"))
    ),
    AppendCase("triton", 64, 12, 12, batch=64, capacity=1152),
    AppendCase("triton", 64, 12, 12, batch=5, rows=700, capacity=1152),
    AppendCase("triton", 128, 5, 1, "float16", rows=7, pairs=0),
)
