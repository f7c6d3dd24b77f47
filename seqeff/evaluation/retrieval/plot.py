"""A heat map of recall over depth and length, a panel a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqeff.evaluation.plot import panels
from seqeff.evaluation.retrieval.grid import Result


def heat_map(results: Sequence[Result], file: Path) -> None:
    """Writes a PNG.

    Raises:
      UserError: see `panels`.
    """
    names = list(dict.fromkeys(result.task for result in results))
    with panels(file, len(names)) as (figure, axes):
        images = [
            _panel(panel, name, [result for result in results if result.task == name])
            for panel, name in zip(axes, names, strict=True)
        ]
        figure.colorbar(images[-1], ax=axes, label="recall")


def _panel(axes: Any, name: str, found: Sequence[Result]) -> Any:
    """Draws the results of a task; gives the image."""
    lengths = sorted({result.length for result in found})
    depths = sorted({result.depth for result in found}, key=lambda x: x or 0.0)
    recall = np.full((len(depths), len(lengths)), np.nan)
    for result in found:
        recall[depths.index(result.depth), lengths.index(result.length)] = result.recall
    image = axes.imshow(recall, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(recall):
        if np.isfinite(value):
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    labels = ["all" if depth is None else f"{depth:g}" for depth in depths]
    axes.set_yticks(range(len(depths)), labels)
    axes.set(title=name, xlabel="length, tokens", ylabel="depth of the answer")
    return image
