"""Sampling from a trained model."""

from seqeff.inference.generate import (
    Generator,
    Sampling,
    check_prompt,
    decode_stream,
    generation_context,
)

__all__ = ["Generator", "Sampling", "check_prompt", "decode_stream", "generation_context"]
