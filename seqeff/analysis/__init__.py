"""What attentions cost and see, by calculation."""

from seqeff.analysis.attended_share import attended_share, model_attended_share
from seqeff.analysis.separators import SeparatorCounts, count_separators, describe

__all__ = [
    "SeparatorCounts",
    "attended_share",
    "count_separators",
    "describe",
    "model_attended_share",
]
