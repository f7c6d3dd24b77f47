"""How the Triton kernel cuts a call into programs, from static shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from jax import Array

from seqeff_kernels import gpu, tuning
from seqeff_kernels.decode_attention.blocks import CacheBlock, NewEntries, distinct_queries
from seqeff_kernels.tuning import power_of_two

MAXIMUM_SPLITS = 256

_HOPPER = (9, 0)
# of shared memory, where Triton does not multiply by wgmma
_SCRATCH = 8 * 1024
# points from which on it does on Hopper
_WIDE_POINTS = 64
_LEAST_TILE, _LEAST_STAGES = 16, 2
# of one tile of keys: two programs share a multiprocessor, each with two tiles on their way
_TILE_BYTES = 16 * 1024
# of the entries of a split: hides a program's start and end, and evens out the last wave
_SPLIT_BYTES = 256 * 1024
# of the bytes of the entries, that partial outputs may cost, written and read
_PARTIAL_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a call is known while tracing.

    Attributes:
      points: query rows times the heads of one KV head, which share its entries.
      entries: the capacities of all blocks, and the new entries.
      lists: of entries: the blocks, and the new entries.
      queries: arrays of queries: the blocks' own, and the call's where they are taken.
    """

    batch: int
    kv_heads: int
    points: int
    head_dim: int
    entries: int
    lists: int = 1
    queries: int = 1

    @classmethod
    def of(cls, queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None) -> Self:
        """The sizes of a call."""
        batch, rows, heads, head_dim = queries.shape
        kv_heads = blocks[0].keys.shape[2]
        return cls(
            batch=batch,
            kv_heads=kv_heads,
            points=rows * heads // kv_heads,
            head_dim=head_dim,
            entries=sum(b.keys.shape[1] for b in blocks) + (0 if new is None else rows),
            lists=len(blocks) + (new is not None),
            queries=len(distinct_queries(queries, blocks, new)),
        )

    def key(self, dtype: str) -> str:
        """The key of the table of tuned plans."""
        return tuning.decode_key(
            dtype=dtype,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            points=self.points,
            batch=self.batch,
            entries=self.entries,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a launch.

    Attributes:
      tile_entries: entries that a program takes at once, a power of two.
      splits: programs that share the entries of one KV head of one row of the batch.
      num_warps: of a program.
      num_stages: of the pipeline of tiles.
    """

    tile_entries: int
    splits: int
    num_warps: int
    num_stages: int


def plan(sizes: Sizes, itemsize: int) -> Plan:
    """The plan where nothing is tuned: what the default device has room for, and fills it.

    Args:
      itemsize: bytes of an element of the keys.
    """
    points, head_dim, entries = sizes.points, sizes.head_dim, sizes.entries
    row_bytes = power_of_two(head_dim) * itemsize
    wide = query_tile(points) >= _WIDE_POINTS
    tile = max(64 if wide else _LEAST_TILE, min(128, _TILE_BYTES // row_bytes))
    tile = min(tile, max(_LEAST_TILE, power_of_two(entries)))
    warps = 8 if wide and row_bytes >= 512 else 4
    stages = most = 3 if wide else 4
    memory = gpu.shared_memory()
    while (taken := program_memory(sizes, itemsize, tile, stages)) > memory:
        if stages > _LEAST_STAGES:
            stages -= 1
        elif tile > _LEAST_TILE:
            tile, stages = tile // 2, most
        else:
            break
    resident = max(1, memory // taken)

    programs = sizes.batch * sizes.kv_heads * -(-points // query_tile(points))
    read = 2 * entries * head_dim * itemsize
    partial = 2 * points * head_dim * 4
    fill = gpu.multiprocessors() * resident // programs
    even = min(read // _SPLIT_BYTES, int(_PARTIAL_SHARE * read / partial))
    most = min(MAXIMUM_SPLITS, -(-entries // (2 * tile)))
    return Plan(
        tile_entries=tile,
        splits=max(1, min(max(fill, even), most)),
        num_warps=warps,
        num_stages=stages,
    )


def query_tile(points: int) -> int:
    """Points in a program's tile: all of a KV head up to 64, and at least a tensor core's 16."""
    return max(16, min(64, power_of_two(points)))


def program_memory(sizes: Sizes, itemsize: int, tile_entries: int, stages: int) -> int:
    """Bytes of shared memory of a program, or somewhat more.

    Args:
      itemsize: bytes of an element of the keys.
    """
    row_bytes = power_of_two(sizes.head_dim) * itemsize
    queries = query_tile(sizes.points)
    if queries < _WIDE_POINTS:
        return 2 * (stages - 1) * tile_entries * row_bytes + _SCRATCH
    wgmma = gpu.compute_capability() in (None, _HOPPER)
    return (2 * stages * tile_entries + queries) * row_bytes + (0 if wgmma else _SCRATCH)
