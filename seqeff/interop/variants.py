"""Models that are of a family but for what a modelling file in their directory adds to it.

One more variant is a function of a model, a name in `VARIANTS`, and its file in `modelling/`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from seqeff import models
from seqeff.checks import ConfigError, UserError
from seqeff.interop.family import Family
from seqeff.interop.settings import Settings
from seqeff.interop.weights import some
from seqeff.models import DenseAttention, SeparatorAttention, TransformerConfig

SETTING = "seqeff"
"""The setting of a `config.json` with the fields of a model that its family does not know."""

_TEMPLATES = Path(__file__).parent / "modelling"
_CLASS = "class"


class Variant(NamedTuple):
    """What a model has beyond a family.

    Attributes:
      name: begins the names of its classes; its modelling file is `modeling_{name}.py`, written for
        GPT-NeoX, and for other families with their names in place of those.
      plain: the model as a family is to express it.
      fields: of `TransformerConfig`, what the model has in place of the plain one's. They are
        written to `config.json`, where the modelling file and an import find them.
      obstacles: what of the model neither can express.
    """

    name: str
    plain: TransformerConfig
    fields: Mapping[str, Any]
    obstacles: tuple[str, ...] = ()

    def settings(self, family: Family) -> dict[str, Any]:
        """What a `config.json` has instead of, and beside, the settings of the family."""
        module, stem = self.file.removesuffix(".py"), _stem(family)
        return {
            "architectures": [self.name + family.architecture],
            # without the file nothing must take it for the family's own
            "model_type": f"{self.name.lower()}_{family.model_type}",
            "auto_map": {
                "AutoConfig": f"{module}.{self.name}{stem}Config",
                "AutoModelForCausalLM": f"{module}.{self.name}{family.architecture}",
            },
            SETTING: {name: _written(value) for name, value in self.fields.items()},
        }

    @property
    def file(self) -> str:
        """The name of the modelling file."""
        return f"modeling_{self.name.lower()}.py"

    def modelling(self, family: Family) -> str:
        """The modelling file's text."""
        text = (_TEMPLATES / self.file).read_text(encoding="utf-8")
        for template, own in (
            ("GPTNeoXForCausalLM", family.architecture),
            ("GPTNeoX", _stem(family)),
            ("gpt_neox", family.model_type),
        ):
            text = text.replace(template, own)
        return text


def read_fields(config: TransformerConfig, settings: Settings) -> TransformerConfig:
    """A model from its plain one and the fields in its `config.json`.

    Raises:
      UserError: there is no such field or class, or a value cannot be.
    """
    try:
        fields = {name: _read(value) for name, value in settings.values.items()}
        return dataclasses.replace(config, **fields)
    except (TypeError, ValueError, ConfigError) as error:
        raise UserError(f"{settings.place}: {error}; give what seqeff export wrote") from error


def separator(config: TransformerConfig) -> Variant | None:
    """Attentions of separators, and windows of any layers."""
    attentions = config.attentions()
    if all(attention == DenseAttention() for attention in attentions):
        return None
    obstacles: dict[str, list[str]] = {}
    for layer, attention in enumerate(attentions):
        for obstacle in _beyond_the_file(attention):
            obstacles.setdefault(obstacle, []).append(str(layer))
    return Variant(
        name="Separator",
        plain=dataclasses.replace(config, attention=DenseAttention(), layer_attention={}),
        fields={
            "attention": config.attention,
            "layer_attention": {
                layer % config.layers: attention
                for layer, attention in config.layer_attention.items()
            },
        },
        obstacles=tuple(f"{name} in layers {some(found)}" for name, found in obstacles.items()),
    )


VARIANTS: tuple[Callable[[TransformerConfig], Variant | None], ...] = (separator,)
"""Each gives what a model has beyond a family, None where that is nothing of its kind."""


def _beyond_the_file(attention: Any) -> list[str]:
    name = type(attention).__name__
    if type(attention) not in (DenseAttention, SeparatorAttention):
        return [name]
    entries = getattr(attention, "cache_entries", None)
    return [] if entries is None else [f"{name}.cache_entries = {entries}"]


def _stem(family: Family) -> str:
    return re.sub("(ForCausalLM|LMHeadModel)$", "", family.architecture)


def _written(value: Any) -> Any:
    """A value as JSON: a dataclass by its name and fields, and what layers have by their number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {x.name: _written(getattr(value, x.name)) for x in dataclasses.fields(value)}
        return {_CLASS: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(layer): _written(item) for layer, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if _CLASS not in value:
        return {int(layer): _read(item) for layer, item in value.items()}
    fields = {name: _read(item) for name, item in value.items()}
    name = fields.pop(_CLASS)
    cls = getattr(models, str(name), None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"there is no class {name!r}")
    return cls(**fields)
