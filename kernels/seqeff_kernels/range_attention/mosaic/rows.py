"""How programs of rows see their sources: bounds, and the tiles that these make them visit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from seqeff_kernels.range_attention.mosaic.pieces import (
    Ring,
    Visits,
    bound_line,
    copy_tiles,
    for_each_item,
    load_rows,
    pad_to,
    split_item,
    tile_visits,
)
from seqeff_kernels.range_attention.mosaic.tiles import Tiles
from seqeff_kernels.range_attention.sources import ListedSource


class Place(NamedTuple):
    """What an item of work is: the rows of a program, of one head."""

    program: Array
    batch_index: Array
    split: Array
    head: Array
    kv_head: Array


class FilledSource(NamedTuple):
    """Entries of which every row attends `[0, filled)`, as many as there are at most."""

    keys: Float[Array, "batch entries kv_heads head_dim"]
    values: Float[Array, "batch entries kv_heads head_dim"]
    filled: Int[Array, " batch"]


class Rows:
    """Blocks of rows, one a worker, and the entry tiles of each source that they visit.

    Bounds never decrease, so those of a block's first and last row tell all: tiles from the first
    row's start to the last row's end are visited, and those from the last row's start to the first
    row's end need no mask.

    Args:
      rows: of the queries.
      sizes: entries of a tile of each source.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        sources: Sequence[ListedSource | FilledSource],
        sizes: Sequence[int],
        tiles: Tiles,
        splits: int = 1,
    ) -> None:
        self._sources, self._sizes, self._splits = sources, sizes, splits
        self._heads = heads
        self._block, self._rows = tiles.block_rows, tiles.rows_of_program
        self._handed = int(tiles.share_rows)
        # those whose bounds are in shared memory, in this order
        self.listed = [i for i, s in enumerate(sources) if isinstance(s, ListedSource)]
        self._programs = pl.cdiv(rows, self._rows)
        self.padded = self._programs * self._rows
        batch, _, self._kv_heads, _ = sources[0].keys.shape
        self.items = self._programs * batch * splits * heads

    def locate(self, item: Array) -> Place:
        """The place of an item: later rows, which attend more, are the first of a row's."""
        batch_index, program, split, head = split_item(
            item, self._programs, self._splits, self._heads
        )
        program = self._programs - 1 - program
        kv_head = lax.div(head, jnp.int32(self._heads // self._kv_heads))
        return Place(program, batch_index, split, head, kv_head)

    def operands(self) -> list[tuple[Array, ...]]:
        """Keys, values and bounds of each source: start and end of its rows, or what is filled."""
        return [
            (source.keys, source.values, source.filled)
            if isinstance(source, FilledSource)
            # rows after the last one repeat it
            else (
                source.keys,
                source.values,
                *(pad_to(b, 2, self._rows, mode="edge") for b in (source.start, source.end)),
            )
            for source in self._sources
        ]

    def bounds_memory(self, buffers: int) -> Any:
        """Shared memory for a program's bounds: start and end of each source that lists them.

        Then come two numbers a row, which a worker may hand to the one that it shares rows with.
        """
        lists = max(1, len(self.listed) + self._handed)
        return plgpu.SMEM((buffers, lists, 2, self._rows), jnp.int32)

    def rows_of(self, place: Place, worker: Any) -> Any:
        """A worker's rows."""
        return pl.ds(place.program * self._rows + worker * self._block, self._block)

    def all_rows_of(self, place: Place) -> Any:
        """The rows of all workers."""
        return pl.ds(place.program * self._rows, self._rows)

    def copy_all(
        self,
        refs: Any,
        own_ring: Ring,
        own_copies: Callable[[Place, Array], Iterable[tuple[Any, Any]]],
        rings: tuple[Ring, Ring],
    ) -> None:
        """All that the copying worker does: what is the rows' own, then their entries, in tiles.

        Args:
          refs: of `operands`.
          own_copies: to a slot of `own_ring`, whose last buffer is `bounds_memory`, which is
            filled too.
          rings: for keys and for values.
        """

        def read(item):
            return self._spans(refs, self.locate(jnp.minimum(item, self.items - 1)))

        def one_item(item, step, carry):
            copied, spans = carry
            upcoming = read(item + lax.axis_size("core"))
            place = self.locate(item)

            def copies(own):
                yield from own_copies(place, own)
                yield from self._bounds_copies(refs, own_ring.buffers[-1], own, place)

            own_ring.fill(step, copies)
            for (keys, values, *_), span, size in zip(
                refs, self._copied(spans, place.split), self._sizes, strict=True
            ):
                copy_tiles(
                    (keys, values),
                    rings,
                    span,
                    copied,
                    size,
                    lambda ref, entries: ref.at[place.batch_index, entries, place.kv_head],
                )
                copied += span[1] - span[0]
            return copied, upcoming

        (copied, _), count = for_each_item(
            self.items, one_item, (jnp.int32(0), read(lax.axis_index("core")))
        )
        for ring, steps in ((rings[0], copied), (rings[1], copied), (own_ring, count)):
            ring.drain(steps)

    def _bounds_copies(
        self, refs: Any, smem: Any, own: Array, place: Place
    ) -> Iterator[tuple[Any, Any]]:
        """Copies of a program's bounds."""
        for index, source in enumerate(self.listed):
            for which, ref in enumerate(refs[source][2:]):
                line = bound_line(ref, place.batch_index, place.kv_head)
                yield ref.at[(*line, self.all_rows_of(place))], smem.at[own, index, which]

    def _spans(self, refs: Any, place: Place) -> list[tuple[Array, Array]]:
        """Lowest start and highest end of a program's rows, for each source."""
        first = place.program * self._rows
        last = first + self._rows - 1
        spans = []
        for (_, _, *bounds), filled in zip(refs, self._filled(refs, place), strict=True):
            if filled is None:
                lines = [(*bound_line(b, place.batch_index, place.kv_head),) for b in bounds]
                ends = zip(bounds, lines, (first, last), strict=True)
                spans.append(tuple(ref[(*line, row)] for ref, line, row in ends))
            else:
                spans.append((jnp.int32(0), filled))
        return spans

    def _filled(self, refs: Any, place: Place) -> list[Array | None]:
        """Of each source, the entries that all rows attend; None where each row's are listed."""
        return [
            jnp.clip(bounds[0][place.batch_index], 0, source.keys.shape[1])
            if isinstance(source, FilledSource)
            else None
            for source, (_, _, *bounds) in zip(self._sources, refs, strict=True)
        ]

    def _copied(
        self, spans: Sequence[tuple[Array, Array]], split: Array
    ) -> list[tuple[Array, Array]]:
        """The tiles of each source that a program copies: its split of all that its rows visit."""
        tiles = []
        for (start, end), size in zip(spans, self._sizes, strict=True):
            first = _before(start, size)
            tiles.append((first, jnp.maximum(first, _after(end, size))))
        if self._splits == 1:
            return tiles
        total = sum(last - first for first, last in tiles)
        low, high = (lax.div(total * s, jnp.int32(self._splits)) for s in (split, split + 1))
        parts = []
        for first, last in tiles:
            count = last - first
            parts.append((first + jnp.clip(low, 0, count), first + jnp.clip(high, 0, count)))
            low, high = low - count, high - count
        return parts

    def bounds(self, refs: Any, smem: Any, own: Array, place: Place) -> Bounds:
        """What a program's rows attend, of which shared memory may be filled after this call."""
        return Bounds(self, self._filled(refs, place), smem, own, place)


@dataclass(frozen=True)
class Bounds:
    """What the rows of a program attend: of each source what is filled, or None and, at `own` in
    shared memory, each row's start and end.
    """

    cut: Rows
    filled: Sequence[Array | None]
    smem: Any
    own: Array
    place: Place

    def visits(self, block: Any) -> list[Visits]:
        """What a block of rows visits in each source."""
        cut = self.cut
        sources = range(len(self.filled))
        spans = [(self._at(source, 0, 0), self.end(source)) for source in sources]
        first = block * cut._block
        last = first + cut._block - 1
        return [
            tile_visits(
                _before(self._at(source, 0, first), size),
                _after(self._at(source, 0, last), size),
                _before(self._at(source, 1, first), size),
                _after(self._at(source, 1, last), size),
                copied,
            )
            for source, copied, size in zip(
                sources, cut._copied(spans, self.place.split), cut._sizes, strict=True
            )
        ]

    def end(self, source: int) -> Array:
        """After the last entry that a program's rows attend."""
        return self._at(source, 1, self.cut._rows - 1)

    def of(self, source: int, block: Any) -> list[Array]:
        """Start and end of a block's rows, or of all rows."""
        if self.filled[source] is not None:
            return [self._at(source, which, 0) for which in range(2)]
        index = self.cut.listed.index(source)
        mine = pl.ds(block * self.cut._block, self.cut._block)
        return [load_rows(self.smem.at[self.own, index, which, mine]) for which in range(2)]

    def _at(self, source: int, which: int, row: Any) -> Array:
        """Start or end of a row."""
        filled = self.filled[source]
        if filled is not None:
            return filled if which else jnp.int32(0)
        return self.smem[self.own, self.cut.listed.index(source), which, row]


def _before(bound: Array, size: int) -> Array:
    return lax.div(bound, jnp.int32(size))


def _after(bound: Array, size: int) -> Array:
    return lax.div(bound + (size - 1), jnp.int32(size))
