"""`seqeff eval --retrieval`: what its options mean, its table and its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqeff.checks import UserError
from seqeff.data.files import nearest
from seqeff.evaluation.retrieval.grid import Cell, Result, evaluate
from seqeff.evaluation.retrieval.plot import heat_map
from seqeff.evaluation.retrieval.reader import Reader
from seqeff.evaluation.retrieval.tasks import TASKS


def bindings(
    names: Sequence[str],
    *,
    lengths: Sequence[int] | None,
    depths: Sequence[float] | None,
    examples: int | None,
    seed: int | None,
    filler: Path | None,
) -> list[str]:
    """The options as overrides of a config; None: the default.

    Raises:
      UserError: there is no task of such a name.
    """
    for name in names:
        if name not in TASKS:
            hint = nearest(name, TASKS)
            raise UserError(f"--retrieval {name}: no such task{hint}; give {', '.join(TASKS)}")
    tasks = ", ".join(f"{name!r}: @{TASKS[name].__name__}()" for name in names)
    given = {
        "Retrieval.lengths": lengths,
        "Retrieval.depths": depths,
        "Retrieval.examples": examples,
        "Retrieval.seed": seed,
        "Filler.path": filler and str(filler),
    }
    return [
        f"Retrieval.tasks={{{tasks}}}",
        *(f"{name}={value!r}" for name, value in given.items() if value is not None),
    ]


def run(
    reader: Reader,
    cells: Sequence[Cell],
    keep: Callable[[Sequence[Mapping[str, Any]], bool], None],
    plot: Path | None,
) -> None:
    """Prints a line a task and length, and draws the heat map.

    Args:
      cells: those of a length together.
      keep: is given all results so far after every line, and whether these are all.
    """
    results: list[Result] = []
    width = max(len(cell.task) for cell in cells)
    for line in _lines(reader, cells):
        if not results or results[-1].task != line[0].task:
            print(_header(line, width), flush=True)
        results += line
        print(_line(line, width), flush=True)
        keep([dataclasses.asdict(result) for result in results], False)
    keep([dataclasses.asdict(result) for result in results], True)
    if plot is not None:
        heat_map(results, plot)


def _lines(reader: Reader, cells: Sequence[Cell]) -> Iterator[list[Result]]:
    """The results of each task and length."""
    line: list[Result] = []
    for cell in cells:
        if line and (line[0].task, line[0].length) != (cell.task, cell.length):
            yield line
            line = []
        line = line + evaluate(reader, cell)
    yield line


def _header(line: Sequence[Result], width: int) -> str:
    depths = "".join(f"{result.depth:>7g}" for result in line if result.depth is not None)
    title = "  recall  exact  entries read" + (f"  recall at depth{depths}" if depths else "")
    return f"{line[0].task:{width}}{'length':>10}{title}"


def _line(line: Sequence[Result], width: int) -> str:
    questions = [result.questions for result in line]
    recall, exact, read = (
        np.average([getattr(result, name) for result in line], weights=questions)
        for name in ("recall", "exact", "entries_read")
    )
    text = f"{'':{width}}{line[0].length:>10,}{recall:8.3f}{exact:7.3f}{read:14.1f}"
    depths = "".join(f"{result.recall:7.2f}" for result in line if result.depth is not None)
    return text + (f"{'':17}{depths}" if depths else "")
