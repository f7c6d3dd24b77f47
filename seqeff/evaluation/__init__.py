"""Scores of a trained model."""

from seqeff.evaluation.perplexity import Perplexity, make_evaluate

__all__ = ["Perplexity", "make_evaluate"]
