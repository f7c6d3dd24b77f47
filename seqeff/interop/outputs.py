"""What exports of every form share: a run's parameters, and a directory that is whole or not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seqeff.checks import UserError, writing
from seqeff.interop.tensors import nested
from seqeff.runs import RunDirectory
from seqeff.training.checkpoints import CheckpointStore

PARAMETER = np.dtype(np.float32)
"""The type of parameters."""


def require_new(output: Path) -> None:
    """Raises a UserError if there is such a directory already."""
    if output.exists():
        raise UserError(f"{output} exists already; give another --output")


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to fill, which is at `output` once all of that succeeds, and else nowhere.

    Raises:
      UserError: it cannot be written.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    with writing(str(output), "or choose another --output"):
        try:
            partial.mkdir(parents=True)
            yield partial
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_parameters(
    run: RunDirectory, shapes: Mapping[str, tuple[int, ...]], checkpoint: int | None
) -> Any:
    """The parameters of a checkpoint on the host, as a nested dict.

    Args:
      shapes: theirs, by dotted path.
      checkpoint: its step; None: the last.

    Raises:
      UserError: it cannot be read.
    """
    wanted = {path: jax.ShapeDtypeStruct(shape, PARAMETER) for path, shape in shapes.items()}
    with CheckpointStore(run.checkpoints) as store:
        state, _ = store.restore(checkpoint, {"parameters": nested(wanted)}, partial=True)
    return jax.tree.map(np.asarray, state["parameters"])
