"""Plots, as PNG files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqeff.checks import UserError, writing
from seqeff.evaluation.perplexity import Perplexity


def check_plot(file: Path) -> None:
    """Raises a UserError if no plot could be written to a file in the end."""
    if file.suffix.lower() != ".png":
        raise UserError(f"--plot {file} is not called .png; give a name such as plot.png")
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            "--plot needs matplotlib: pip install 'seqeff[plot]', or leave it out"
        ) from error
    matplotlib.use("Agg")


@contextlib.contextmanager
def panels(file: Path, count: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes, side by side; after them, it is written whole or not at all.

    Raises:
      UserError: see `check_plot`, or the file cannot be written.
    """
    check_plot(file)
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(
        1, count, figsize=(3.6 * count + 0.8, 4.0), layout="constrained", squeeze=False
    )
    try:
        yield figure, axes[0].tolist()
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        with writing(str(file), "or choose another --plot"):
            try:
                figure.savefig(partial, dpi=150, format="png")
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)
    finally:
        pyplot.close(figure)


def curves(
    places: Sequence[float], lines: Mapping[str, Sequence[Perplexity]], label: str, file: Path
) -> None:
    """Perplexity by place, a line of points for each name.

    Args:
      places: of the points, which `label` explains.

    Raises:
      UserError: see `panels`.
    """
    with panels(file) as (figure, (axes,)):
        for name, line in lines.items():
            points = [(x, y.perplexity) for x, y in zip(places, line, strict=True) if y.tokens]
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.set(xlabel=label, ylabel="perplexity", yscale="log")
        axes.grid(which="both", alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        figure.legend(loc="outside upper center")
