"""How programs of rows see their sources: bounds, and the tiles that these make them visit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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


class Rows:
    """Blocks of rows, one a worker, and the entry tiles of each source that they visit.

    Bounds never decrease, so those of a block's first and last row tell all: tiles from the first
    row's start to the last row's end are visited, and those from the last row's start to the first
    row's end need no mask.
    """

    def __init__(
        self,
        heads: int,
        sources: Sequence[ListedSource],
        sizes: Sequence[int],
        tiles: Tiles,
        splits: int = 1,
    ) -> None:
        self._sources, self._sizes, self._splits = sources, sizes, splits
        self._heads = heads
        self._block, self._rows = tiles.block_rows, tiles.rows_of_program
        self._handed = int(tiles.share_rows)
        # rows after the last one repeat it
        self._bounds = [
            tuple(pad_to(b, 2, self._rows, mode="edge") for b in (s.start, s.end)) for s in sources
        ]
        self.padded = self._bounds[0][0].shape[-1]
        self._programs = self.padded // self._rows
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
        """Keys, values, start and end of each source."""
        return [(s.keys, s.values, *b) for s, b in zip(self._sources, self._bounds, strict=True)]

    def bounds_memory(self, buffers: int) -> Any:
        """Shared memory for a program's bounds: start and end of each source.

        Then come two numbers a row, which a worker may hand to the one that it shares rows with.
        """
        lists = len(self._sources) + self._handed
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
        for source, (_, _, *bounds) in enumerate(refs):
            for which, ref in enumerate(bounds):
                line = bound_line(ref, place.batch_index, place.kv_head)
                yield ref.at[(*line, self.all_rows_of(place))], smem.at[own, source, which]

    def _spans(self, refs: Any, place: Place) -> list[tuple[Array, Array]]:
        """Lowest start and highest end of a program's rows, for each source."""
        first = place.program * self._rows
        return [
            (
                start[(*bound_line(start, place.batch_index, place.kv_head), first)],
                end[(*bound_line(end, place.batch_index, place.kv_head), first + self._rows - 1)],
            )
            for _, _, start, end in refs
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

    def visits(self, smem: Any, own: Array, worker: Array, split: Array) -> list[Visits]:
        """What a worker visits in each source, from the bounds in shared memory."""
        sources = range(len(self._sources))
        spans = [(smem[own, s, 0, 0], self.end(smem, own, s)) for s in sources]
        first = worker * self._block
        last = first + self._block - 1
        return [
            tile_visits(
                _before(smem[own, source, 0, first], size),
                _after(smem[own, source, 0, last], size),
                _before(smem[own, source, 1, first], size),
                _after(smem[own, source, 1, last], size),
                copied,
            )
            for source, copied, size in zip(
                sources, self._copied(spans, split), self._sizes, strict=True
            )
        ]

    def end(self, smem: Any, own: Array, source: int) -> Array:
        """After the last entry that a program's rows attend, from shared memory."""
        return smem[own, source, 1, self._rows - 1]

    def bounds(self, smem: Any, own: Array, source: int, worker: Array) -> list[Array]:
        """Start and end of a worker's rows, from shared memory."""
        mine = pl.ds(worker * self._block, self._block)
        return [load_rows(smem.at[own, source, which, mine]) for which in range(2)]


def _before(bound: Array, size: int) -> Array:
    return lax.div(bound, jnp.int32(size))


def _after(bound: Array, size: int) -> Array:
    return lax.div(bound + (size - 1), jnp.int32(size))
