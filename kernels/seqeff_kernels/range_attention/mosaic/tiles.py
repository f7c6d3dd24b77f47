"""How the Mosaic kernels cut their work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from seqeff_kernels.range_attention.operands import Static

BLOCK = 64  # rows of a tensor core product
# bytes of a program, and of them those of bounds, barriers and alignment
SHARED_MEMORY = 227 * 1024
_SMALL = 8 * 1024


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

    @property
    def rows_of_program(self) -> int:
        """Rows of all of a program's compute workers."""
        return self.block_rows * self.workers

    def fitted(self, head_dim: int, queries: int) -> Tiles:
        """These, with one buffer where two of `queries` distinct queries would not fit."""
        block = 2 * head_dim * self.rows_of_program * queries
        tile = 2 * head_dim * max(self.block_entries, self.window_entries)
        fits = self.buffers * block + 2 * self.stages * tile + _SMALL <= SHARED_MEMORY
        return self if fits else dataclasses.replace(self, buffers=1, take_turns=False)

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
