"""The tasks by their names."""

from collections.abc import Mapping
from types import MappingProxyType

from seqeff.evaluation.retrieval.associative_recall import AssociativeRecall
from seqeff.evaluation.retrieval.example import Task
from seqeff.evaluation.retrieval.frequent_words import CommonWords, FrequentWords
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
from seqeff.evaluation.retrieval.variables import VariableTracking

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        "passkey": Passkey,
        "needle": Needle,
        "niah-single": MultiNeedle,
        "niah-multikey": MultiKey,
        "niah-haystack": KeyHaystack,
        "niah-multivalue": MultiValue,
        "niah-multiquery": MultiQuery,
        "key-value": KeyValue,
        "mqar": AssociativeRecall,
        "variable-tracking": VariableTracking,
        "common-words": CommonWords,
        "frequent-words": FrequentWords,
    }
)
