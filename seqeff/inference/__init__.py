"""Sampling from a trained model."""

from seqeff.inference.generate import Generator, Sampling, decode_stream

__all__ = ["Generator", "Sampling", "decode_stream"]
