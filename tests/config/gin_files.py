"""Small config classes in a package `lab`, and gin files that use them."""

import textwrap

import pytest

from seqeff import config
from seqeff.checks import ConfigError

MODELS = """
    from __future__ import annotations
    import dataclasses
    from typing import Literal, Protocol, runtime_checkable
    from seqeff.checks import check_types, require

    @runtime_checkable
    class Attention(Protocol):
        def attend(self): ...

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class DenseAttention:
        def attend(self): ...

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SeparatorAttention:
        window: int = 64
        separators: tuple[str, ...] = (".", ",")
        def attend(self): ...

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class RMSNorm:
        epsilon: float = 1e-6

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LayerNorm:
        epsilon: float = 1e-5

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Model:
        width: int
        heads: int = 4
        attention: Attention
        norm: RMSNorm | LayerNorm = RMSNorm()
        dtype: Literal["float32", "bfloat16"] = "bfloat16"
        def __post_init__(self):
            check_types(self)
            require(self.width % self.heads == 0,
                    f"Model.width = {self.width} must be a multiple of Model.heads = {self.heads}")

    @dataclasses.dataclass
    class Mutable:
        size: int = 1

    @dataclasses.dataclass(frozen=True)
    class _Private:
        size: int = 1
"""

TRAINING = """
    import dataclasses
    from lab.models import Model
    from seqeff.checks import check_types
    from seqeff.paths import LocalPath, LocalPathOrName, LocalPattern

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class AdamW:
        learning_rate: float
        b1: float = 0.9

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Muon:
        learning_rate: float = 0.02

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TextFiles:
        path: str
        weight: float = 1.0

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Corpus:
        patterns: tuple[LocalPattern, ...] = ()
        file: LocalPath | None = None
        dataset: LocalPathOrName = ""
        notes: LocalPath = "notes.txt"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wandb:
        project: str = "seqeff"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Train:
        model: Model
        optimizer: AdamW | Muon
        sources: tuple[TextFiles, ...] = ()
        steps: int = 100
        deterministic: bool = False
        note: str | None = None
        shape: tuple[int, ...] = (1, 2)
        limits: dict[str, float] = dataclasses.field(default_factory=dict)
        tracker: Wandb | None = None
        corpus: Corpus | None = None
        def __post_init__(self):
            check_types(self)
"""

BASE = """
    # a small run
    Train.model = @Model()
    Train.optimizer = @AdamW()
    Model.width = 64
    Model.attention = @DenseAttention()
    AdamW.learning_rate = 1e-3
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip("\n"))
    return path


def loaded(text, *overrides, **options):
    with open("x.gin", "w") as file:
        file.write(textwrap.dedent(text).lstrip("\n"))
    return config.load("x.gin", overrides, **options)


def train(*overrides):
    return config.load("base.gin", overrides).root


def message(text, *overrides, **options):
    with pytest.raises(ConfigError) as caught:
        loaded(text, *overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_base(text):
    return "include 'base.gin'\n" + textwrap.dedent(text).lstrip("\n")
