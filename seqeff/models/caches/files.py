"""Caches in files, so that a stream can stop and go on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from seqeff.checks import UserError, writing


def save_cache(path: Path, cache: Any, metadata: Mapping[str, str]) -> None:
    """Writes a cache's arrays and some words to a safetensors file, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    arrays = {jax.tree_util.keystr(name): x for name, x in _named(cache)}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(arrays, partial, metadata=dict(metadata))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def load_cache(path: Path, like: Any) -> tuple[Any, dict[str, str]]:
    """The cache and the words of a file.

    Args:
      like: a cache of the same kinds and sizes.

    Raises:
      UserError: the file cannot be read, or holds a cache of other kinds or sizes.
    """
    try:
        with safe_open(path, framework="flax") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    expected = {jax.tree_util.keystr(name): x for name, x in _named(like)}
    shapes, wanted = (
        {name: (x.shape, jnp.dtype(x.dtype).name) for name, x in found.items()}
        for found in (arrays, expected)
    )
    if shapes != wanted:
        raise UserError(f"{path} holds the cache of another model or of other sizes; remove it")
    return jax.tree.structure(like).unflatten(arrays[name] for name in expected), metadata


def _named(cache: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(cache)[0]
