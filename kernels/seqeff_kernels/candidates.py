"""The plans that `seqeff_kernels.tune` tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from seqeff_kernels.decode_attention.mosaic import Plan as MosaicPlan
from seqeff_kernels.decode_attention.plan import MAXIMUM_SPLITS, Plan
from seqeff_kernels.range_attention.triton import Tiles


class Step(NamedTuple):
    """Changes to the best plan so far, compared by the time of one pass.

    Attributes:
      timed: the pass; `training` is forward and backward.
      changes: fields and their new values; no change at all is always compared too.
    """

    timed: str
    changes: Sequence[Mapping[str, Any]]


MOSAIC_STEPS = (
    Step(
        "forward",
        (
            {"take_turns": False},
            {"window_entries": 128},
            {"block_entries": 64, "stages": 3},
            {"block_entries": 64, "stages": 3, "take_turns": False},
            {"workers": 3, "block_entries": 64, "stages": 2},
            {"workers": 3, "block_entries": 64, "stages": 3, "buffers": 1},
        ),
    ),
    Step(
        "training",
        (
            {"backward_stages": 3, "backward_buffers": 1},
            {"backward_workers": 1, "backward_stages": 3},
            {"backward_workers": 3, "backward_buffers": 1},
        ),
    ),
)


def _triton_step(timed: str, kernel: str, *tiles: tuple[int, int, int, int, bool]) -> Step:
    return Step(timed, [{kernel: Tiles(*sizes)} for sizes in tiles])


# rows, entries, warps, stages, a loop of their own for full tiles
TRITON_STEPS = (
    _triton_step(
        "forward",
        "forward",
        (64, 64, 4, 3, True),
        (64, 64, 4, 3, False),
        (64, 64, 4, 2, False),
        (64, 32, 4, 3, False),
        (64, 32, 4, 4, False),
        (128, 64, 8, 3, True),
        (128, 64, 8, 3, False),
        (128, 64, 8, 2, False),
        (128, 32, 8, 2, True),
        (64, 32, 8, 2, True),
    ),
    _triton_step(
        "training",
        "queries_gradient",
        (64, 64, 4, 3, True),
        (64, 64, 4, 2, False),
        (64, 32, 4, 3, False),
        (64, 32, 4, 4, False),
        (128, 64, 8, 3, False),
        (64, 64, 8, 2, True),
        (64, 64, 8, 2, False),
        (64, 32, 8, 2, True),
        (64, 32, 8, 3, True),
    ),
    _triton_step(
        "training",
        "packed_gradient",
        (32, 64, 4, 3, True),
        (32, 64, 4, 3, False),
        (64, 64, 4, 2, True),
        (64, 64, 4, 2, False),
        (64, 128, 8, 3, True),
        (64, 64, 8, 2, True),
        (32, 64, 8, 2, True),
        (64, 32, 8, 2, True),
    ),
    _triton_step(
        "training",
        "entries_gradient",
        (32, 64, 4, 2, True),
        (32, 64, 4, 3, False),
        (64, 64, 4, 2, True),
        (64, 64, 4, 2, False),
        (32, 64, 8, 2, True),
        (64, 32, 8, 2, True),
        (64, 32, 8, 2, False),
    ),
)

# entries of a tile, warps, stages
_DECODE_TILES = (
    (16, 4, 4),
    (32, 4, 3),
    (32, 4, 5),
    (32, 8, 4),
    (64, 2, 4),
    (64, 4, 3),
    (64, 4, 4),
    (64, 8, 3),
    (128, 4, 3),
    (128, 8, 3),
)
# entries of a tile and stages; those for which there is no room are skipped
_MOSAIC_DECODE_TILES = ((64, 2), (64, 3), (64, 4), (64, 6), (128, 2), (128, 3))
_SPLITS = (0.25, 0.5, 0.75, 1.5, 2, 4)


def decode_steps(start: Plan) -> tuple[Step, ...]:
    """Tiles first, then how many programs share the entries of a KV head."""
    tiles = [
        {"tile_entries": entries, "num_warps": warps, "num_stages": stages}
        for entries, warps, stages in _DECODE_TILES
    ]
    return Step("call", tiles), _split_step(start.splits)


def mosaic_decode_steps(start: MosaicPlan) -> tuple[Step, ...]:
    """The same for the Mosaic kernel."""
    tiles = [
        {"tile_entries": entries, "stages": stages} for entries, stages in _MOSAIC_DECODE_TILES
    ]
    shared = [
        {**tile, "splits": splits, "share_points": True}
        for tile in tiles
        for splits in sorted({1, max(1, start.splits // 2), start.splits})
    ]
    return Step("call", tiles), _split_step(start.splits), Step("call", shared)


def _split_step(splits: int) -> Step:
    """Some more and some fewer; one too, after which nothing is left to merge."""
    counts = {1, *(max(1, round(splits * factor)) for factor in _SPLITS)}
    fitting = sorted(count for count in counts if count <= MAXIMUM_SPLITS)
    return Step("call", [{"splits": count} for count in fitting])
