"""Sequence-efficient language models in JAX: train, fine-tune, compress, decode."""

__version__ = "0.1.0"
