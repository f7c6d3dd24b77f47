"""Whether a model finds in a long context what it is asked for: tasks that need no download."""

from seqeff.evaluation.retrieval.associative_recall import AssociativeRecall
from seqeff.evaluation.retrieval.example import Example, Question, Row, Task
from seqeff.evaluation.retrieval.frequent_words import CommonWords, FrequentWords
from seqeff.evaluation.retrieval.grid import Cell, Result, Retrieval, Score, evaluate, score
from seqeff.evaluation.retrieval.haystack import Filler
from seqeff.evaluation.retrieval.key_value import KeyValue
from seqeff.evaluation.retrieval.needle import Needle
from seqeff.evaluation.retrieval.niah import (
    KeyHaystack,
    MultiKey,
    MultiNeedle,
    MultiQuery,
    MultiValue,
)
from seqeff.evaluation.retrieval.passkey import Passkey
from seqeff.evaluation.retrieval.reader import ModelReader, Reader
from seqeff.evaluation.retrieval.tasks import TASKS
from seqeff.evaluation.retrieval.variables import VariableTracking

__all__ = [
    "TASKS",
    "AssociativeRecall",
    "Cell",
    "CommonWords",
    "Example",
    "Filler",
    "FrequentWords",
    "KeyHaystack",
    "KeyValue",
    "ModelReader",
    "MultiKey",
    "MultiNeedle",
    "MultiQuery",
    "MultiValue",
    "Needle",
    "Passkey",
    "Question",
    "Reader",
    "Result",
    "Retrieval",
    "Row",
    "Score",
    "Task",
    "VariableTracking",
    "evaluate",
    "score",
]
