"""Sampling from models, many requests at a time."""

from seqeff.inference.engine import (
    PROMPT_ROWS,
    CacheUse,
    Engine,
    generation_context,
    most_kept_by,
)
from seqeff.inference.prompts import Named, read_requests, results, to_request
from seqeff.inference.requests import Piece, Request, check_room, failures
from seqeff.inference.sampling import Sampling
from seqeff.inference.trained import TrainedModel, load_run

__all__ = [
    "PROMPT_ROWS",
    "CacheUse",
    "Engine",
    "Named",
    "Piece",
    "Request",
    "Sampling",
    "TrainedModel",
    "check_room",
    "failures",
    "generation_context",
    "load_run",
    "most_kept_by",
    "read_requests",
    "results",
    "to_request",
]
