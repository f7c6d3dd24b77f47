"""The GPU backend for many query points on one KV head: range attention's forward kernel.

The points (query rows and heads) of a KV head are the kernel's rows: they share each tile of
entries, which the copying worker fetches ahead of the products.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from seqeff_kernels import gpu, tuning
from seqeff_kernels.decode_attention.blocks import CacheBlock, NewEntries, distinct_queries
from seqeff_kernels.decode_attention.merge import merge
from seqeff_kernels.decode_attention.plan import Sizes
from seqeff_kernels.range_attention import mosaic
from seqeff_kernels.range_attention.mosaic.tiles import BLOCK, SHARED_MEMORY, Tiles
from seqeff_kernels.range_attention.mosaic.tiles import Plan as KernelPlan
from seqeff_kernels.range_attention.operands import Static
from seqeff_kernels.range_attention.sources import ListedSource

HEAD_DIMS = (64, 128, 256)
# head sizes with their dtypes, and devices, on which experiments/gpu_checks/attention.py has passed
TESTED = frozenset(itertools.product((64, 128, 256), ("bfloat16", "float16")))
TESTED_CAPABILITIES = ((9, 0),)
_LEAST_STAGES, _MOST_STAGES = 2, 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a launch.

    Attributes:
      splits: parts in which the entries of a KV head are cut, an item of work each.
      stages: tiles of entries in shared memory.
      tile_entries: entries of a tile.
      share_points: two workers have the same points, up to 64, and take every other tile each, so
        that one multiplies while the other takes its exponentials.
    """

    splits: int
    stages: int
    tile_entries: int = BLOCK
    share_points: bool = False

    def fitted(self, sizes: Sizes) -> Plan:
        """This or what fits of it: with fewer stages, smaller tiles, and points not shared."""
        small = dataclasses.replace(self, tile_entries=BLOCK)
        for plan in (self, small, dataclasses.replace(small, share_points=False)):
            most = _most_stages(sizes, plan.workers(sizes), plan.tile_entries, plan.share_points)
            if most >= _LEAST_STAGES:
                break
        return dataclasses.replace(plan, stages=min(plan.stages, most))

    def workers(self, sizes: Sizes) -> int:
        """Compute workers of a program: two where they share points, or there are points for them
        and room, as they share what is copied.
        """
        both = sizes.points > BLOCK and _most_stages(sizes, 2) >= _LEAST_STAGES
        return 2 if both or self.share_points else 1


def obstacle(queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None) -> str | None:
    """Why this backend cannot serve, or None."""
    arrays = [queries, *(new or ())]
    for block in blocks:
        arrays += [block.keys, block.values, *([] if block.queries is None else [block.queries])]
    sizes = Sizes.of(queries, blocks, new)
    found = mosaic.kernel_obstacle(arrays, HEAD_DIMS, sizes.lists, "blocks, new entries counted")
    if found is not None:
        return found
    odd = [block.keys.shape[1] for block in blocks if block.keys.shape[1] % mosaic.LINES]
    if odd:
        return f"a block's capacity, {odd[0]}, is not a multiple of {mosaic.LINES}"
    if _most_stages(sizes, workers=1) < _LEAST_STAGES:
        return (
            f"{sizes.queries} different queries of head_dim {sizes.head_dim} leave no room in "
            f"shared memory for {_LEAST_STAGES} tiles of entries"
        )
    return None


def plan(sizes: Sizes) -> Plan:
    """The plan where nothing is tuned: parts that fill the chip, and as much in flight as fits."""
    start = Plan(splits=1, stages=_MOST_STAGES)
    workers = start.workers(sizes)
    programs = sizes.batch * sizes.kv_heads * math.ceil(sizes.points / (BLOCK * workers))
    splits = max(1, min(gpu.multiprocessors() // programs, math.ceil(sizes.entries / BLOCK)))
    return dataclasses.replace(start, splits=splits).fitted(sizes)


def chosen_plan(queries: Array, blocks: tuple[CacheBlock, ...], new: NewEntries | None) -> Plan:
    """The plan that the table lists, or that of the shapes, cut to what fits."""
    sizes = Sizes.of(queries, blocks, new)
    key = sizes.key(str(queries.dtype))
    # what is listed under a key may have fewer blocks, and fewer arrays of queries
    return tuning.planned("decode", "mosaic", key, Plan, lambda: plan(sizes)).fitted(sizes)


def attend(
    queries: Float[Array, "batch rows heads head_dim"],
    blocks: tuple[CacheBlock, ...],
    new: NewEntries | None,
    scale: float,
    planned: Plan | None = None,
) -> tuple[Float[Array, "batch rows heads head_dim"], Float[Array, "batch rows heads"]]:
    """See `decode_attention`; `planned` replaces `chosen_plan`, for tuning."""
    from seqeff_kernels.range_attention.mosaic.forward import forward
    from seqeff_kernels.range_attention.mosaic.rows import FilledSource

    batch, rows, heads, head_dim = queries.shape
    sizes = Sizes.of(queries, blocks, new)
    kv_heads, points = sizes.kv_heads, sizes.points
    planned = planned or chosen_plan(queries, blocks, new)

    def to_points(array: Array) -> Array:
        split = array.reshape(batch, rows, kv_heads, -1, head_dim)
        return jnp.moveaxis(split, 3, 2).reshape(batch, points, kv_heads, head_dim)

    distinct = distinct_queries(queries, blocks, new)

    def place(own: Array | None) -> int:
        taken = queries if own is None else own
        return next(index for index, other in enumerate(distinct) if other is taken)

    which = [place(block.queries) for block in blocks]
    sources: list[ListedSource | FilledSource] = [
        FilledSource(block.keys, block.values, block.filled.astype(jnp.int32)) for block in blocks
    ]
    if new is not None:
        which.append(place(None))
        end = (jnp.arange(points, dtype=jnp.int32) // (points // rows))[None, None] + 1
        keys, values = map(mosaic.pad_lines, new)
        sources.append(ListedSource(None, keys, values, jnp.zeros_like(end), end))

    tiles = _tiles(
        planned.workers(sizes), planned.tile_entries, planned.stages, planned.share_points
    )
    static = tuple(Static(i, s.keys.shape[1], False, None) for i, s in enumerate(sources))
    output, logsumexp = forward(
        [to_points(own) for own in distinct],
        sources,
        KernelPlan(tuple(which), static, scale, tiles),
        splits=planned.splits,
        clear_values=True,
    )
    logsumexp = jnp.swapaxes(logsumexp[..., :points], 1, 2)
    output, logsumexp = merge(
        output[:, :points].reshape(batch, planned.splits, points * kv_heads, head_dim),
        logsumexp.reshape(batch, planned.splits, points * kv_heads),
        queries.dtype,
    )

    def to_heads(array: Array) -> Array:
        split = array.reshape(batch, rows, points // rows, kv_heads, *array.shape[2:])
        return jnp.swapaxes(split, 2, 3).reshape(batch, rows, heads, *array.shape[2:])

    return to_heads(output), to_heads(logsumexp)


def _tiles(workers: int, entries: int, stages: int, share_points: bool) -> Tiles:
    return Tiles(
        workers=workers,
        block_entries=entries,
        window_entries=entries,
        stages=stages,
        buffers=1,
        take_turns=False,
        share_rows=share_points,
    )


def _most_stages(
    sizes: Sizes, workers: int, tile_entries: int = BLOCK, share_points: bool = False
) -> int:
    """How many stages fit beside the queries and the rows' bounds; 0 if not one does."""

    def fits(stages: int) -> bool:
        tiles = _tiles(workers, tile_entries, stages, share_points)
        return tiles.shared_memory(sizes.head_dim, sizes.queries, sizes.lists) <= SHARED_MEMORY

    return next(filter(fits, range(_MOST_STAGES, 0, -1)), 0)
