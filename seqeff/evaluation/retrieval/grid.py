"""The examples of tasks, lengths and depths, and how well they are answered."""

from __future__ import annotations

import collections
import dataclasses
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from seqeff.checks import UserError, check_types, require
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval.example import Example, Row, Task, fingerprint
from seqeff.evaluation.retrieval.haystack import words_of
from seqeff.evaluation.retrieval.reader import Reader


class Cell(NamedTuple):
    """Examples that differ by their number only.

    Attributes:
      depth: None where the task has none.
    """

    task: str
    length: int
    depth: float | None
    examples: Sequence[Example | Row]


class Score(NamedTuple):
    """Of a continuation.

    Attributes:
      recall: the share of the answers that are among its words; RULER's own takes parts of words
        too, in any case.
      exact: 1 if its first words are the answers, in any order and perhaps with "and" between.
    """

    recall: float
    exact: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Of the questions of a cell whose answers stand at one depth.

    Attributes:
      depth: None where the answers stand in several places.
      questions: that many, of all the examples.
      recall, exact: means of `Score`.
      sha256: of the cell's token ids (`fingerprint`).
      entries_read, entries_resident: of the whole cell, as in `Perplexity`.
      seconds: of the whole cell, with what had to be compiled.
    """

    task: str
    length: int
    depth: float | None
    examples: int
    questions: int
    recall: float
    exact: float
    sha256: str
    entries_read: float
    entries_resident: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What is asked.

    Attributes:
      tasks: by their names.
      lengths: of prompt and answer together, in tokens; without any, that of the run's rows.
      depths: of tasks that have one.
      examples: of each task, length and depth.
      seed: another one gives other examples. Each depends on its task's settings, its length and
        its depth alone.
    """

    tasks: Mapping[str, Task]
    lengths: Sequence[int] = ()
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.tasks), "Retrieval.tasks is empty; give at least one")
        require(bool(self.depths), "Retrieval.depths is empty; give at least one")
        for length in self.lengths:
            require(length >= 1, f"Retrieval.lengths has {length}; give numbers of at least 1")
        for depth in self.depths:
            require(0 <= depth <= 1, f"Retrieval.depths has {depth}; give numbers from 0 to 1")
        require(self.examples >= 1, f"Retrieval.examples = {self.examples} must be at least 1")

    def cells(self, tokenizer: Tokenizer, row: int) -> Iterator[Cell]:
        """By task, then length, then depth.

        Args:
          row: the length where none is given.

        Raises:
          UserError: a length is too short for a task; names both.
        """
        for name, task in self.tasks.items():
            for length in sorted({*self.lengths} or {row}):
                for depth in sorted({*self.depths}) if task.has_depth else (None,):
                    try:
                        yield Cell(
                            name,
                            length,
                            depth,
                            [
                                task.make(
                                    tokenizer,
                                    length,
                                    0.5 if depth is None else depth,
                                    random.Random(f"{self.seed} {name} {length} {depth} {number}"),
                                )
                                for number in range(self.examples)
                            ],
                        )
                    except UserError as error:
                        raise UserError(f"{name}: {error}") from error


def score(text: str, answers: Sequence[str]) -> Score:
    """What a continuation is worth."""
    words = words_of(text)
    found = sum(answer in words for answer in answers) / len(answers)
    first = [word for word in words if word != "and"][: len(answers)]
    return Score(found, float(sorted(first) == sorted(answers)))


def evaluate(reader: Reader, cell: Cell) -> list[Result]:
    """The results of a cell, by the depth of the questions' answers."""
    begin = time.perf_counter()
    by_depth: dict[float | None, list[Score]] = collections.defaultdict(list)
    texts = [example for example in cell.examples if isinstance(example, Example)]
    rows = [example for example in cell.examples if isinstance(example, Row)]
    if texts:
        for example, continuations in zip(texts, reader.answers(texts), strict=True):
            for question, text in zip(example.questions, continuations, strict=True):
                by_depth[question.depth].append(score(text, question.answers))
    if rows:
        for row, predicted in zip(rows, reader.predictions(rows), strict=True):
            right = np.asarray(predicted == row.targets, float).tolist()
            by_depth[None] += [Score(one, one) for one in right]
    seconds, use = time.perf_counter() - begin, reader.use
    return [
        Result(
            task=cell.task,
            length=cell.length,
            depth=depth,
            examples=len(cell.examples),
            questions=len(scores),
            recall=_mean(one.recall for one in scores),
            exact=_mean(one.exact for one in scores),
            sha256=fingerprint(cell.examples),
            entries_read=use.read / max(use.tokens, 1),
            entries_resident=use.resident,
            seconds=seconds,
        )
        for depth, scores in sorted(by_depth.items(), key=lambda item: item[0] or 0.0)
    ]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
