"""What a family of models must say to be read and written, and what several of them share."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from seqeff.checks import UserError
from seqeff.interop.settings import Settings
from seqeff.interop.tensors import Tensor
from seqeff.models import (
    DenseAttention,
    LinearScaling,
    Llama3Scaling,
    Rotary,
    RotaryScaling,
    TransformerConfig,
    YarnScaling,
)


class Family(NamedTuple):
    """A family of `transformers`.

    Attributes:
      architecture, model_type: its names in a `config.json`.
      read: from the settings to the model; refuses settings that it cannot express.
      write: from any model to the settings that come nearest to it. A model is of the family if
        `read` makes the same of them.
      tensors: of a model.
      activation: that its models usually have; tells apart families that can express the same.
      length: the setting with the number of positions.
      prefix: begins the names of tensors, and is left out in some files.
      ignored: a regular expression of names that are no parameters.
    """

    architecture: str
    model_type: str
    read: Callable[[Settings], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    tensors: Callable[[TransformerConfig], Sequence[Tensor]]
    activation: str
    length: str = "max_position_embeddings"
    prefix: str = ""
    ignored: str = r"(?!)"


ACTIVATIONS: dict[str, Any] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Their activations, and ours."""

ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
"""Our activations, and theirs."""

_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


def read_dtype(settings: Settings) -> Any:
    """The type to compute in: of the weights, bfloat16 for float16."""
    name = "torch_dtype" if settings.values.get("dtype") is None else "dtype"
    return settings.choice(name, _DTYPES, "float32")


_LENGTH = ("original_max_position_embeddings", int)
_SCALINGS: dict[str, tuple[type[Any], dict[str, tuple[str, type]]]] = {
    "linear": (LinearScaling, {"factor": ("factor", float)}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": ("factor", float),
            "low_frequency_factor": ("low_freq_factor", float),
            "high_frequency_factor": ("high_freq_factor", float),
            "original_length": _LENGTH,
        },
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": ("factor", float),
            "original_length": _LENGTH,
            "fast": ("beta_fast", float),
            "slow": ("beta_slow", float),
            "attention_factor": ("attention_factor", float),
        },
    ),
}
"""By their name our class, and of its fields the name and type that they have there."""


def read_rotary(
    settings: Settings,
    base: str = "rope_theta",
    fraction: str = "partial_rotary_factor",
    default_fraction: float = 1.0,
) -> Rotary:
    """Rotary positions, as any version of `transformers` writes them.

    Args:
      base, fraction: names of the settings where there is no `rope_parameters`.
    """
    parameters = settings.part("rope_parameters") or settings.part("rope_scaling")
    parameters = parameters or Settings({}, settings.place)
    if any(isinstance(value, Mapping) for value in parameters.values.values()):
        raise UserError(f"{parameters.place} differs between layers: not supported")
    return Rotary(
        base=parameters.get("rope_theta", settings.get(base, 10_000.0)),
        fraction=parameters.get("partial_rotary_factor", settings.get(fraction, default_fraction)),
        scaling=_read_scaling(parameters),
    )


def _read_scaling(parameters: Settings) -> RotaryScaling | None:
    name = "type" if "rope_type" not in parameters.values else "rope_type"
    known = parameters.choice(name, {"default": None, **_SCALINGS}, "default")
    if known is None:
        return None
    parameters.only(truncate=True, mscale=None, mscale_all_dim=None)
    cls, names = known
    values = {}
    for field in dataclasses.fields(cls):
        theirs, kind = names[field.name]
        if field.default is dataclasses.MISSING:
            values[field.name] = parameters.required(theirs, kind)
        elif (value := parameters.optional(theirs, kind, None)) is not None:
            values[field.name] = value
    return cls(**values)


def write_scaling(positions: Any) -> dict[str, Any] | None:
    """`rope_scaling` of rotary positions; null where it knows no such scaling."""
    scaling = getattr(positions, "scaling", None)
    for name, (cls, names) in _SCALINGS.items():
        if type(scaling) is cls:
            values = {theirs: getattr(scaling, ours) for ours, (theirs, _) in names.items()}
            return {"rope_type": name, **{k: v for k, v in values.items() if v is not None}}
    return None


def one_window(config: TransformerConfig) -> int | None:
    """The most common window of the layers' dense attentions; None without one."""
    windows = [window for window in map(window_of, config.attentions()) if window is not None]
    return collections.Counter(windows).most_common(1)[0][0] if windows else None


def window_of(attention: Any) -> int | None:
    """The window of a dense attention."""
    return attention.window if isinstance(attention, DenseAttention) else None
