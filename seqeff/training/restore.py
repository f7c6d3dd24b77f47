"""Trained parameters, for what comes after training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from seqeff.data import Tokenizer
from seqeff.runs import RunDirectory
from seqeff.training.checkpoints import CheckpointStore
from seqeff.training.config import Train
from seqeff.training.mesh import MeshConfig, find_devices
from seqeff.training.program import Program, prepare_backend


def restore(
    run: RunDirectory, config: Train, tokenizer: Tokenizer, checkpoint: int | None
) -> tuple[Program, Any]:
    """The compiled functions of a run, and the parameters of one of its checkpoints."""
    prepare_backend(config)
    # a run made on many devices is read on those here that share its batch
    mesh = MeshConfig(data=1, fsdp=math.gcd(len(find_devices()), config.data.batch_size))
    program = Program(dataclasses.replace(config, mesh=mesh), tokenizer.vocabulary())
    with jax.set_mesh(program.mesh), CheckpointStore(run.checkpoints) as store:
        wanted = {"parameters": program.abstract_state["parameters"]}
        state, _ = store.restore(checkpoint, wanted, partial=True)
    return program, state["parameters"]
