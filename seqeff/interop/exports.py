"""A run's model as a directory that `transformers` loads."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqeff.checks import UserError, flatten
from seqeff.data import Tokenizer
from seqeff.data.tokenizer import GENERATION, SETTINGS, ends_listed
from seqeff.interop.families import FAMILIES
from seqeff.interop.family import Family
from seqeff.interop.merges import merge
from seqeff.interop.outputs import (
    PARAMETER,
    new_directory,
    read_parameters,
    require_new,
)
from seqeff.interop.settings import Settings
from seqeff.interop.tensors import by_name, parameter_shapes, placements, without_place
from seqeff.interop.tokenizer_files import (
    copy_tokenizer,
    tokenizer_settings,
)
from seqeff.interop.variants import VARIANTS, Variant
from seqeff.interop.weights import some, write_weights
from seqeff.models import TransformerConfig
from seqeff.runs import RunDirectory

DTYPES: dict[str, np.dtype] = {
    "float32": PARAMETER,
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Types that weights can be written in."""


class Exported(NamedTuple):
    """What was written of a model.

    Attributes:
      architecture: that it was written as.
      merged: dotted paths of the kernels that were multiplied out.
      parameters: how many the run has, and how many were written.
    """

    architecture: str
    merged: tuple[str, ...]
    parameters: tuple[int, int]


def export_model(
    run: RunDirectory,
    config: TransformerConfig,
    length: int,
    tokenizer: Tokenizer,
    output: Path,
    *,
    checkpoint: int | None = None,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
) -> Exported:
    """Writes the model of a run, complete or not at all: config, weights, tokenizer.

    Layers that can be are multiplied out (`merges.py`). What a family of `transformers` lacks comes
    with it as a modelling file (`variants.py`).

    Args:
      config: of the run's model.
      length: of its rows.
      output: the directory to make.
      checkpoint: step of the parameters; None: the last.
      dtype: of the weights, one of `DTYPES`; only float32 loses nothing.
      shard_bytes: of the largest file of weights.

    Raises:
      UserError: no family of `transformers` can express the model, nor a modelling file, the
        checkpoint cannot be read, or the directory is there already or cannot be written.
    """
    require_new(output)
    config = config.for_vocabulary(tokenizer.vocabulary())
    merged = merge(config)
    family, variant, settings = _expressed(merged.plain, run)
    own_shapes, shapes = parameter_shapes(config), parameter_shapes(merged.plain)
    parameters = by_name(read_parameters(run, own_shapes, checkpoint))
    parameter = functools.partial(merged.parameter, parameters)
    cast = DTYPES[dtype]
    length, ends = config.positions.limit or length, tokenizer.ends_of_text
    with new_directory(output) as partial:
        settings |= {
            family.length: length,
            "torch_dtype": dtype,
            "bos_token_id": tokenizer.named_begin,
            "eos_token_id": tokenizer.end_of_text if len(ends) == 1 else list(ends),
        }
        _write_json(partial / "config.json", settings)
        if variant is not None:
            text = variant.modelling(family)
            (partial / variant.file).write_text(text, encoding="utf-8")
        _write_tokenizer(run, partial)
        _write_ends(partial / GENERATION, settings["eos_token_id"], ends)
        tensors = placements(family.tensors(merged.plain), shapes)
        # transformers takes earlier names for its own models alone
        by_theirs = {tensor.names[-1 if variant else 0]: tensor for tensor in tensors}
        write_weights(
            partial,
            {name: math.prod(tensor.shape) * cast.itemsize for name, tensor in by_theirs.items()},
            lambda name: _cast(name, by_theirs[name].read(parameter), cast),
            shard_bytes,
        )
    return Exported(
        architecture=settings["architectures"][0],
        merged=tuple(path for path in merged.kernels if path in shapes),
        parameters=(_count(own_shapes), _count(shapes)),
    )


def _cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor in another type; a `UserError` that names it where that has no room for a number."""
    with np.errstate(over="ignore"):
        found = tensor.astype(dtype, copy=False)
    if (np.isfinite(tensor) & ~np.isfinite(found.astype(np.float32))).any():
        raise UserError(
            f"{name} holds numbers beyond {dtype}, up to {np.abs(tensor).max():.3g}; "
            "give --dtype bfloat16 or float32"
        )
    return found


class _Expressed(NamedTuple):
    """The family that a model is of, the variant of it if it is one, and its settings."""

    family: Family
    variant: Variant | None
    settings: dict[str, Any]


def _expressed(config: TransformerConfig, run: RunDirectory) -> _Expressed:
    """How a model is written.

    Raises:
      UserError: no family and no variant can express it; says what keeps it from the one that comes
        nearest.
    """
    variants = [variant for find in VARIANTS if (variant := find(config)) is not None]
    obstacles: dict[str, list[str]] = {}
    shapes = parameter_shapes(config)
    for variant in (None, *variants):
        plain = config if variant is None else variant.plain
        fitting: list[_Expressed] = []
        for family in FAMILIES:
            settings = {
                "architectures": [family.architecture],
                "model_type": family.model_type,
                **family.write(plain),
            }
            found = [
                *(() if variant is None else variant.obstacles),
                *_differences(plain, family, settings),
                *(f"the tensor {name}" for name in without_place(family.tensors(plain), shapes)),
            ]
            if found:
                obstacles[family.architecture] = found
            else:
                own = {} if variant is None else variant.settings(family)
                fitting.append(_Expressed(family, variant, settings | own))
        if fitting:
            usual = config.feed_forward.activation
            return max(fitting, key=lambda fit: fit.family.activation == usual)
    nearest = min(obstacles, key=lambda name: len(obstacles[name]))
    raise UserError(
        f"{run.path} is of no family of transformers ({', '.join(obstacles)}); the nearest, "
        f"{nearest}, has no place for {', '.join(obstacles[nearest])}"
    )


def _differences(
    config: TransformerConfig, family: Family, settings: Mapping[str, Any]
) -> list[str]:
    """The values of a model that its settings in a family do not give back."""
    try:
        back = family.read(Settings(settings, family.architecture))
    except UserError as error:
        return [str(error)]
    wanted, found = flatten(_canonical(config)), flatten(_canonical(back))
    values = [
        f"{name} = {reprlib.repr(value) if isinstance(value, tuple) else value}"
        for name, value in wanted.items()
        if name not in found or found[name] != value
    ]
    layers: dict[str, list[str]] = {}
    for layer, (own, their) in enumerate(zip(config.attentions(), back.attentions(), strict=True)):
        if own != their:
            layers.setdefault(type(own).__name__, []).append(str(layer))
    attentions = [f"{name} in layers {some(numbers)}" for name, numbers in layers.items()]
    return [*attentions, *values]


def _canonical(config: TransformerConfig) -> TransformerConfig:
    """The same function of the parameters but for the attention, with defaults written out."""
    heads = config.projections
    return TransformerConfig(
        vocabulary_size=config.vocabulary_size,
        width=config.width,
        layers=config.layers,
        projections=dataclasses.replace(
            heads,
            kv_heads=heads.groups(),
            head_dim=heads.size(config.width),
            output_bias=heads.bias if heads.output_bias is None else heads.output_bias,
        ),
        feed_forward=config.feed_forward,
        norm=config.norm,
        positions=config.positions,
        residual=config.residual,
        tie_embeddings=config.tie_embeddings,
    )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _write_tokenizer(run: RunDirectory, directory: Path) -> None:
    """Copies the tokenizer; tells `transformers` to take it as it is, unless it says a class."""
    copy_tokenizer(run.tokenizer, directory)
    settings = tokenizer_settings(directory)
    if "tokenizer_class" not in settings:
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
        _write_json(directory / SETTINGS, settings)


def _write_ends(file: Path, end: Any, ends: tuple[int, ...]) -> None:
    """Has settings of generation, which come before those of the model, name the same ends."""
    if file.is_file() and {*(ends_listed(file) or ())} != {*ends}:
        _write_json(file, {**Settings.load(file).values, "eos_token_id": end})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
