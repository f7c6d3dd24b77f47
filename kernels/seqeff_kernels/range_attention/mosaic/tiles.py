"""How the Mosaic kernels cut their work."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from seqeff_kernels.range_attention.operands import Static

BLOCK = 64  # rows of a tensor core product
# bytes of a program; what its arrays, each, are aligned to; and of a barrier
SHARED_MEMORY = 227 * 1024
_ALIGNED = 1024
# 16-bit numbers of a swizzle, of which the output is written a multiple at a time
_SWIZZLED = 64
_BARRIER = 8
# scratch of reductions, of which none crosses warps
REDUCTION_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the kernels cut their work.

    Attributes:
      block_rows: rows of a compute worker, a multiple of 64.
      workers: compute workers of a program, 1 to 3.
      block_entries: entries of a tile.
      window_entries: the same for sources with a window, whose tiles are mostly edges.
      stages: tiles in shared memory.
      buffers: blocks of rows in shared memory for each worker: with two, the next one's copy is
        under way while one is done.
      take_turns: of two workers, one multiplies while the other takes its exponentials; needs two
        buffers.
      share_rows: both of two workers have the program's one block of rows, each takes every other
        tile, and what they found is merged: for few rows of many entries.
      backward_workers: the same as `workers`, for the gradients.
      backward_tile: entries of a tile for the gradient of the queries, and rows of one for those
        of the keys and values.
      backward_stages: the same as `stages`, for the gradients.
      backward_buffers: the same as `buffers`, for the gradients.
    """

    block_rows: int = BLOCK
    workers: int = 2
    block_entries: int = 128
    window_entries: int = 64
    stages: int = 2
    buffers: int = 2
    take_turns: bool = True
    share_rows: bool = False
    backward_workers: int = 2
    backward_tile: int = 64
    backward_stages: int = 2
    backward_buffers: int = 2

    def __post_init__(self) -> None:
        if self.take_turns and self.workers == 2 and self.buffers == 1:
            # one ends its block when the other begins the next, for whose rows there is no room
            raise ValueError(
                "take_turns with 2 workers needs 2 buffers, not 1: the workers would wait for each "
                "other for ever; give take_turns=False or buffers=2"
            )
        if self.share_rows and (self.workers != 2 or self.take_turns):
            raise ValueError(
                f"share_rows needs 2 workers that do not take turns, not workers={self.workers} "
                f"and take_turns={self.take_turns}"
            )

    @property
    def blocks_of_program(self) -> int:
        """Blocks of rows of a program."""
        return 1 if self.share_rows else self.workers

    @property
    def rows_of_program(self) -> int:
        """Rows of all of a program's compute workers."""
        return self.block_rows * self.blocks_of_program

    @staticmethod
    def handed_columns(head_dim: int) -> int:
        """Columns that a worker hands to another at a time: half of them, but a whole swizzle."""
        return max(_SWIZZLED, head_dim // 2)

    def shared_memory(self, head_dim: int, queries: int, sources: int) -> int:
        """Bytes of shared memory of a forward program, of 16-bit numbers.

        Args:
          queries: how many distinct queries the sources take.
        """
        rows = self.buffers * self.rows_of_program
        tile = self.stages * max(self.block_entries, self.window_entries)
        handed = self.block_rows * self.handed_columns(head_dim) if self.share_rows else 0
        arrays = (
            # in the place of the queries is what a worker hands to another
            max(2 * head_dim * rows * queries, 4 * handed),
            2 * head_dim * tile,
            2 * head_dim * tile,
            # start and end of each source, and two numbers that a worker hands to another
            2 * 4 * rows * (sources + self.share_rows),
            REDUCTION_BYTES,
        )
        # ready and free of each slot of three rings, the turn, and two for what is handed over
        barriers = 2 * (self.buffers + 2 * self.stages) + 3
        return sum(math.ceil(size / _ALIGNED) * _ALIGNED for size in arrays) + _BARRIER * barriers

    def fitted(self, head_dim: int, queries: int, sources: int) -> Tiles:
        """These or, where they do not fit, with one buffer or, where need be, small tiles too.

        Args:
          queries: how many distinct queries the sources take.
        """
        single = dataclasses.replace(self, buffers=1, take_turns=False)
        small = dataclasses.replace(single, block_entries=BLOCK, window_entries=BLOCK)
        fitting = (
            tiles
            for tiles in (self, single)
            if tiles.shared_memory(head_dim, queries, sources) <= SHARED_MEMORY
        )
        return next(fitting, small)

    def entries(self, window: int | None) -> int:
        """Entries of a forward tile of a source with or without a window."""
        return self.block_entries if window is None else self.window_entries


@dataclass(frozen=True)
class Plan:
    """What is known while tracing.

    Attributes:
      queries: which of the distinct queries each source takes.
    """

    queries: tuple[int, ...]
    static: tuple[Static, ...]
    scale: float
    tiles: Tiles

    def for_gradients(self) -> Plan:
        """The plan whose workers are those of the gradients."""
        tiles = dataclasses.replace(
            self.tiles, workers=self.tiles.backward_workers, take_turns=False
        )
        return dataclasses.replace(self, tiles=tiles)

    @property
    def entries(self) -> tuple[int, ...]:
        """Entries of a forward tile of each source."""
        return tuple(self.tiles.entries(known.window) for known in self.static)
