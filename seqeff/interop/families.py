"""The families that are known. One more is a `Family` in a file of its own, and a name here."""

from __future__ import annotations

from seqeff.interop.family import Family
from seqeff.interop.gpt2 import GPT2
from seqeff.interop.gpt_neox import GPT_NEOX
from seqeff.interop.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from seqeff.interop.opt import OPT

FAMILIES: tuple[Family, ...] = (GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, OPT)
"""A model that several can express is written as the first with its activation, else the first."""
