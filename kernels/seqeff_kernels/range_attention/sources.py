"""Sources: lists of keys and values of which every query row attends one contiguous range."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from seqeff_kernels.range_attention.packing import PackedIndices, gather


class ListedSource(NamedTuple):
    """A source with its bounds listed, for the backends."""

    queries: Float[Array, "batch rows heads head_dim"] | None
    keys: Float[Array, "batch entries kv_heads head_dim"]
    values: Float[Array, "batch entries kv_heads head_dim"]
    start: Int[Array, "batch_or_1 kv_heads_or_1 rows"]
    end: Int[Array, "batch_or_1 kv_heads_or_1 rows"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RangeSource:
    """Entries in a chosen order; row i attends the entries `[start_i, end_i)`.

    Neither bound may decrease along the rows; `end_i <= start_i` is an empty range. Bounds are
    given per row of the batch, or per row and KV head. Entries that lie in no row's range may hold
    anything, NaN included; but the chosen tokens of a packed source must be finite, in a range or
    not: the Mosaic kernels multiply them by weights of 0. The other backends do not ask it.

    Attributes:
      queries: replaces the call's queries for this source, such as queries rotated by other
        positions.
      packed: where given, keys and values are those of all tokens, and the entries are the chosen
        ones, as `gather` takes them. A backend may then gather on the way, which costs less.
      finite: whether the caller vouches that no entry is NaN or infinite, in a range or not; the
        Mosaic kernels copy other keys and values first, to clear them.
    """

    keys: Float[Array, "batch entries_or_tokens kv_heads head_dim"]
    values: Float[Array, "batch entries_or_tokens kv_heads head_dim"]
    start: Int[Array, "batch rows"] | Int[Array, "batch kv_heads rows"]
    end: Int[Array, "batch rows"] | Int[Array, "batch kv_heads rows"]
    queries: Float[Array, "batch rows heads head_dim"] | None = None
    packed: PackedIndices | None = None
    finite: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def entries(self) -> int:
        """How many entries there are, attended or not."""
        return self.keys.shape[1] if self.packed is None else self.packed.indices.shape[1]

    def is_clean(self, rows: int) -> bool:
        """Whether it is known while tracing that no entry is NaN that no row attends."""
        del rows
        return self.finite

    def bounds(
        self, rows: int
    ) -> tuple[Int[Array, "batch kv_heads_or_1 rows"], Int[Array, "batch kv_heads_or_1 rows"]]:
        """Start and end of every row's range, within `[0, entries]`."""
        del rows
        start, end = (b[:, None] if b.ndim == 2 else b for b in (self.start, self.end))
        return _clip(start, self), _clip(end, self)

    def listed(self, rows: int) -> ListedSource:
        """The source with the bounds of `rows` rows listed."""
        keys, values = self.keys, self.values
        if self.packed is not None:
            keys, values = gather(keys, self.packed), gather(values, self.packed)
        return ListedSource(self.queries, keys, values, *self.bounds(rows))

    def check(self, queries: Float[Array, "batch rows heads head_dim"], name: str) -> None:
        """Raises ValueError, naming the source, if one of its shapes does not fit `queries`."""
        _check_entries(self, queries, name)
        batch, rows = queries.shape[:2]
        if self.packed is not None:
            indices, count = self.packed
            check_integers(indices, ((batch, indices.shape[-1]),), f"{name}.packed.indices")
            check_integers(count, (self.keys.shape[:2],), f"{name}.packed.count")
        shapes = ((batch, rows), (batch, self.keys.shape[2], rows))
        for field in ("start", "end"):
            check_integers(getattr(self, field), shapes, f"{name}.{field}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenSource:
    """The tokens' own keys and values; row i is token `t = row_offset + i`.

    Row i attends the tokens `[max(document_start_i, t - window + 1), t + 1)`. The bounds are
    described, not listed, so that a backend can recognise dense causal attention and pure windows
    while it traces.

    Attributes:
      document_start: index of the first token of row i's document; None: nothing separates tokens.
      window: how many tokens a row attends, itself included; None: all earlier ones.
      row_offset: token index of row 0, one for all or one for each row of the batch, when the
        rows are a suffix of the tokens or one of them, as in decoding. None is 0.
      queries: replaces the call's queries for this source.
      finite: as in `RangeSource`.
    """

    keys: Float[Array, "batch entries kv_heads head_dim"]
    values: Float[Array, "batch entries kv_heads head_dim"]
    document_start: Int[Array, "batch rows"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    row_offset: int | Int[Array, ""] | Int[Array, " batch"] | None = None
    queries: Float[Array, "batch rows heads head_dim"] | None = None
    finite: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def entries(self) -> int:
        """How many tokens there are."""
        return self.keys.shape[1]

    @property
    def begins_at_first_token(self) -> bool:
        """Whether row 0 is token 0, known while tracing."""
        offset = self.row_offset
        return offset is None or (isinstance(offset, int) and offset == 0)

    def is_clean(self, rows: int) -> bool:
        """Whether it is known while tracing that no entry is NaN that no row attends."""
        # left padding has document_start > t, which leaves entries that no row attends
        attended = self.document_start is None and rows == self.entries
        return self.finite or (self.begins_at_first_token and attended)

    def bounds(
        self, rows: int
    ) -> tuple[Int[Array, "batch_or_1 1 rows"], Int[Array, "batch_or_1 1 rows"]]:
        """Start and end of every row's range, within `[0, entries]`."""
        offset = jnp.asarray(0 if self.row_offset is None else self.row_offset, jnp.int32)
        token = offset.reshape(-1, 1, 1) + jnp.arange(rows, dtype=jnp.int32)
        start = jnp.zeros_like(token) if self.window is None else token - (self.window - 1)
        if self.document_start is not None:
            start = jnp.maximum(start, self.document_start[:, None])
        return _clip(start, self), _clip(token + 1, self)

    def listed(self, rows: int) -> ListedSource:
        """The source with the bounds of `rows` rows listed."""
        return ListedSource(self.queries, self.keys, self.values, *self.bounds(rows))

    def check(self, queries: Float[Array, "batch rows heads head_dim"], name: str) -> None:
        """Raises ValueError, naming the source, if one of its shapes does not fit `queries`."""
        _check_entries(self, queries, name)
        batch, rows = queries.shape[:2]
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            raise ValueError(
                f"{name}.window is {self.window!r}; give an int, at least 1, or None for all"
            )
        if self.document_start is not None:
            check_integers(self.document_start, ((batch, rows),), f"{name}.document_start")
        if self.row_offset is not None:
            offset = jnp.asarray(self.row_offset)
            check_integers(offset, ((), (batch,)), f"{name}.row_offset")
        elif rows > self.entries:
            raise ValueError(
                f"{name} has {self.entries} tokens for {rows} rows; "
                "without row_offset every row is one of the tokens"
            )


Source = RangeSource | TokenSource


def _clip(bound: Array, source: Source) -> Array:
    return jnp.clip(bound, 0, source.entries).astype(jnp.int32)


def check_integers(array: Array, shapes: tuple[tuple[int, ...], ...], name: str) -> None:
    """Raises ValueError, naming it, if it is no array of integers of one of the shapes."""
    expected = " or ".join(map(str, shapes))
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise ValueError(
            f"{name} is a {type(array).__name__}; give an array of integers of {expected}"
        )
    if array.shape not in shapes or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; give integers of {expected}"
        )


def _check_entries(source: Source, queries: Array, name: str) -> None:
    batch, _, heads, head_dim = queries.shape
    if source.keys.ndim != 4 or source.keys.shape != source.values.shape:
        raise ValueError(
            f"{name}.keys and values have shapes {source.keys.shape} and {source.values.shape}; "
            "give both as (batch, entries, kv_heads, head_dim)"
        )
    if source.keys.shape[0] != batch or source.keys.shape[3] != head_dim:
        raise ValueError(
            f"{name}.keys has shape {source.keys.shape}; the queries' batch is {batch} and their "
            f"head_dim {head_dim}"
        )
    if source.entries == 0:
        raise ValueError(f"{name} has no entries; leave the source out")
    if heads % source.keys.shape[2]:
        raise ValueError(
            f"{name}: {heads} heads do not divide into {source.keys.shape[2]} KV heads"
        )
    if source.queries is not None and source.queries.shape != queries.shape:
        raise ValueError(
            f"{name}.queries has shape {source.queries.shape}; the call's has {queries.shape}"
        )
