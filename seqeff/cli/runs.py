"""Runs that commands read."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqeff import training
    from seqeff.config import LoadedConfig
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory
    from seqeff.training.program import Program


def open_run(
    options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[RunDirectory, training.Train, Tokenizer]:
    """A run directory, its config with the overrides, and its tokenizer; touches no device."""
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory

    run = RunDirectory(options.run_dir).require()
    config = load(run.operative_config, overrides, run).root
    return run, config, Tokenizer.load(run.tokenizer)


def restore(
    run: RunDirectory, config: training.Train, tokenizer: Tokenizer, checkpoint: int | None
) -> tuple[Program, Any]:
    """The compiled functions of a run, and the parameters of one of its checkpoints."""
    import jax

    from seqeff.training.checkpoints import CheckpointStore
    from seqeff.training.mesh import MeshConfig, find_devices
    from seqeff.training.program import Program, prepare_backend

    prepare_backend(config)
    # a run made on many devices is read on those here that share its batch
    mesh = MeshConfig(data=1, fsdp=math.gcd(len(find_devices()), config.data.batch_size))
    program = Program(dataclasses.replace(config, mesh=mesh), tokenizer.vocabulary())
    with jax.set_mesh(program.mesh), CheckpointStore(run.checkpoints) as store:
        wanted = {"parameters": program.abstract_state["parameters"]}
        state, _ = store.restore(checkpoint, wanted, partial=True)
    return program, state["parameters"]


def load(
    path: Path,
    overrides: Sequence[str],
    run: RunDirectory | None,
    earlier: Path | None = None,
) -> LoadedConfig:
    from seqeff.config import load

    module_paths = [run.modules] if run is not None else []
    return load(path, overrides, module_paths=module_paths, earlier=earlier)


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
