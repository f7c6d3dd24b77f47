"""A heat map of recall over depth and length, a panel a task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seqeff.checks import UserError, writing
from seqeff.evaluation.retrieval.grid import Result


def require_matplotlib() -> None:
    """Raises a UserError where matplotlib is absent."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            "--plot needs matplotlib: pip install 'seqeff[plot]', or leave it out"
        ) from error
    matplotlib.use("Agg")


def heat_map(results: Sequence[Result], file: Path) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
      UserError: there is no matplotlib, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    names = list(dict.fromkeys(result.task for result in results))
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(3.6 * len(names) + 0.8, 4.0), layout="constrained", squeeze=False
    )
    try:
        image = None
        for axes, name in zip(panels[0], names, strict=True):
            found = [result for result in results if result.task == name]
            lengths = sorted({result.length for result in found})
            depths = sorted({result.depth for result in found}, key=lambda x: x or 0.0)
            recall = np.full((len(depths), len(lengths)), np.nan)
            for result in found:
                at = depths.index(result.depth), lengths.index(result.length)
                recall[at] = result.recall
            image = axes.imshow(recall, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (row, column), value in np.ndenumerate(recall):
                if np.isfinite(value):
                    color = "black" if value > 0.6 else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            labels = ["all" if depth is None else f"{depth:g}" for depth in depths]
            axes.set_yticks(range(len(depths)), labels)
            axes.set(title=name, xlabel="length, tokens", ylabel="depth of the answer")
        if image is not None:
            figure.colorbar(image, ax=panels[0].tolist(), label="recall")
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        with writing(str(file), "or choose another --plot"):
            try:
                figure.savefig(partial, dpi=150, format="png")
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)
    finally:
        pyplot.close(figure)
