"""Whether a model finds in a long context what it is asked for: tasks that need no download."""

from seqeff.evaluation.retrieval.associative_recall import AssociativeRecall
from seqeff.evaluation.retrieval.example import Example, Question, Row, Task
from seqeff.evaluation.retrieval.grid import Cell, Grid, Result, Score, evaluate, score
from seqeff.evaluation.retrieval.haystack import Filler
from seqeff.evaluation.retrieval.key_value import KeyValue
from seqeff.evaluation.retrieval.needle import Needle
from seqeff.evaluation.retrieval.passkey import Passkey
from seqeff.evaluation.retrieval.reader import ModelReader, Reader

__all__ = [
    "AssociativeRecall",
    "Cell",
    "Example",
    "Filler",
    "Grid",
    "KeyValue",
    "ModelReader",
    "Needle",
    "Passkey",
    "Question",
    "Reader",
    "Result",
    "Row",
    "Score",
    "Task",
    "evaluate",
    "score",
]
