"""What a run would cost, without training."""

from __future__ import annotations

import math
from typing import Any

import jax

from seqeff.models.flops import parameter_count
from seqeff.training.config import Train
from seqeff.training.program import (
    Program,
    abstract_batch,
    flops_per_token,
    prepare_backend,
    prepare_new,
    unlikely_epochs,
)


def describe(config: Train) -> str:
    """Parameters, FLOPs a token, memory and data of a run; the step is compiled, and not run.

    Raises:
      UserError: whatever would stop the run before its first step.
    """
    prepare_backend(config)
    if config.tracker is not None:
        config.tracker.check()
    prepared = prepare_new(config)
    program = Program(config, prepared.tokenizer.vocabulary())
    flops = flops_per_token(program.model, prepared)
    with jax.set_mesh(program.mesh):
        compiled = program.step.lower(
            program.abstract_state, abstract_batch(program, config)
        ).compile()
    memory = compiled.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    parameters, optimizer = (
        _size(program.abstract_state[part]) for part in ("parameters", "optimizer")
    )
    tokens = sum(store.part.tokens for store in prepared.train_stores)
    total = config.steps * config.tokens_per_step
    devices = program.mesh.devices
    lines = [
        f"model: {parameter_count(program.model):,} parameters",
        f"cost: {flops / 1e6:,.1f} MFLOP a token forward and backward, "
        f"{flops * total / 1e15:,.3f} PFLOP in all",
        f"data: {tokens:,} training tokens; {config.steps:,} steps of {config.tokens_per_step:,} "
        f"are {total / max(tokens, 1):.2f} epochs",
        f"devices: {devices.size} of kind {devices.flat[0].device_kind}, "
        + ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items()),
        f"memory a device: parameters {_bytes(parameters)}, optimizer {_bytes(optimizer)}, "
        f"step {_bytes(temporary)}, together {_bytes(parameters + optimizer + temporary)}",
    ]
    if warning := unlikely_epochs(config, prepared):
        lines.append(warning)
    return "\n".join(lines)


def _size(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
