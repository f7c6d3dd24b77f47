"""A run's model as a directory of functions, weights, and an example that runs them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import seqeff
from seqeff.checks import UserError
from seqeff.data import Tokenizer
from seqeff.interop.outputs import new_directory, read_parameters, require_new
from seqeff.interop.stablehlo.functions import ARGUMENTS, PORTABLE, Functions
from seqeff.interop.tensors import by_name, parameter_shapes
from seqeff.interop.tokenizer_files import copy_tokenizer
from seqeff.interop.weights import write_weights
from seqeff.models import TransformerConfig, cached_parameters
from seqeff.runs import RunDirectory
from seqeff_kernels.range_attention import Backend

EXAMPLE = "example.py"
# of the flatbuffer that a function is written as, with room for the rest of it
_MOST_INSIDE = 2**31 - 2**24


def export_functions(
    run: RunDirectory,
    config: TransformerConfig,
    length: int,
    tokenizer: Tokenizer,
    output: Path,
    *,
    checkpoint: int | None = None,
    weights: Literal["inside", "beside"] = "beside",
    backend: Backend = PORTABLE,
    sizes: Mapping[str, int] | None = None,
) -> Functions:
    """Writes prefill and decode step of a run's model, complete or not at all.

    Args:
      config: of the run's model.
      length: of its rows.
      output: the directory to make.
      checkpoint: step of the parameters; None: the last.
      weights: inside each function, or in one file beside them.
      backend: of attention. Functions of another than the portable one are for devices like the
        present one, and of fixed sizes.
      sizes: fixed ones, all of `Functions.sizes`; None: callers choose them.

    Raises:
      UserError: a size is missing or is none of the model's, the backend cannot serve, the weights
        are too large to be inside, the checkpoint cannot be read, or the directory is there already
        or cannot be written.
    """
    require_new(output)
    config = config.for_vocabulary(tokenizer.vocabulary())
    config = dataclasses.replace(config, attention_backend=backend)
    arrays = cached_parameters(config, read_parameters(run, parameter_shapes(config), checkpoint))
    functions = Functions(config, tokenizer.vocabulary_size, arrays, sizes)
    held = by_name(arrays) if weights == "inside" else None
    _check_inside(held or {})
    exported = {name: functions.exported(name, held) for name in ARGUMENTS}
    about = {
        "row_length": length,
        "most_tokens": config.positions.limit,
        "begin_of_text": tokenizer.begin_of_text,
        "ends_of_text": tokenizer.ends_of_text,
        "attention_backend": backend,
        **_description(functions, exported, weights),
    }
    with new_directory(output) as partial:
        for name, function in exported.items():
            (partial / f"{name}.exported").write_bytes(function.serialize())
        text = json.dumps(about, indent=1) + "\n"
        (partial / "model.json").write_text(text, encoding="utf-8")
        if weights == "beside":
            _write(by_name(arrays), partial)
        copy_tokenizer(run.tokenizer, partial)
        shutil.copyfile(Path(__file__).with_name(EXAMPLE), partial / EXAMPLE)
    return functions


def _check_inside(weights: Mapping[str, np.ndarray]) -> None:
    size = sum(array.nbytes for array in weights.values())
    if size > _MOST_INSIDE:
        raise UserError(
            f"the weights have {size:,} bytes, and a function holds at most {_MOST_INSIDE:,}: give "
            "--weights beside"
        )


def _description(
    functions: Functions, exported: Mapping[str, jax.export.Exported], weights: str
) -> dict[str, Any]:
    """What a caller of the functions must know, as JSON has it."""
    beside = weights == "beside"
    arguments = {
        name: [x for x in names if x != "weights" or beside] for name, names in ARGUMENTS.items()
    }
    version = exported["prefill"].calling_convention_version
    return {
        "arguments": arguments,
        "results": ["logits", "cache"],
        "sizes": functions.sizes,
        "constraints": functions.constraints,
        "arrays": jax.tree.map(
            lambda spec: spec._asdict(),
            {x: functions.arrays[x] for x in functions.arrays if x != "weights" or beside},
            is_leaf=lambda node: isinstance(node, tuple),
        ),
        "platforms": exported["prefill"].platforms,
        "versions": {
            "seqeff": seqeff.__version__,
            "jax": jax.__version__,
            "calling_convention": version,
        },
    }


def _write(weights: Mapping[str, np.ndarray], directory: Path) -> None:
    sizes = {name: array.nbytes for name, array in weights.items()}
    # one file, which anybody can read without a library
    write_weights(directory, sizes, weights.__getitem__, shard_bytes=sum(sizes.values()))
