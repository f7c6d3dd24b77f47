"""Tokens a second of whole training steps, on random tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqeff.bench.report import random_vocabulary
from seqeff.data import Batch
from seqeff.models.flops import attended_entries, parameter_count, training_flops_per_token
from seqeff.training import Train
from seqeff.training.metrics import model_flops_utilisation
from seqeff.training.program import Program, prepare_backend

_WARM_UP, _GROUPS = 3, 5


def benchmark_training(configs: Sequence[tuple[str, Train]], steps: int) -> list[dict[str, Any]]:
    """Times each config's step: the median of five groups of steps, after compilation.

    A row of the batch is one document of random tokens, so data loading is not part of it. Metrics
    are read after each group only. A config that fails is a row that says why.
    """
    results = []
    for name, config in configs:
        try:
            results.append({"config": name} | _measure(config, steps))
        except jax.errors.JaxRuntimeError as error:
            results.append({"config": name, "error": str(error).splitlines()[0]})
    return results


def _measure(config: Train, steps: int) -> dict[str, Any]:
    prepare_backend(config)
    data, vocabulary = config.data, config.model.vocabulary_size
    program = Program(config, random_vocabulary(vocabulary))
    with jax.set_mesh(program.mesh):
        shape = (data.batch_size, data.sequence_length)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, vocabulary)
        start = jnp.zeros(shape, jnp.int32) if data.separate_documents else None
        batch = Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones(shape, jnp.float32), start)
        batch = jax.device_put(batch, program.batch_sharding)
        state = program.initialise(jax.random.key(config.seed))
        begin = time.perf_counter()
        step = program.step.lower(state, batch).compile()
        compiling = time.perf_counter() - begin
        for _ in range(_WARM_UP):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        times = []
        per_group = max(1, steps // _GROUPS)
        for _ in range(_GROUPS):
            begin = time.perf_counter()
            for _ in range(per_group):
                state, metrics = step(state, batch)
            jax.block_until_ready(state)
            times.append((time.perf_counter() - begin) / per_group)
    seconds = statistics.median(times)
    speed = config.tokens_per_step / seconds
    flops = training_flops_per_token(
        program.model, attended_entries(program.model, tokens[:1], None)
    )
    device = jax.devices()[0]
    utilisation = model_flops_utilisation(speed, flops, program.mesh.size, device)
    memory = step.memory_analysis()
    return {
        "device": device.device_kind,
        "devices": program.mesh.size,
        "sequence_length": data.sequence_length,
        "batch_size": data.batch_size,
        "accumulate": config.accumulate,
        "parameters": parameter_count(program.model),
        "dtype": config.model.dtype,
        "deterministic": config.deterministic,
        "tokens_per_second": round(speed),
        "milliseconds": round(1e3 * seconds, 2),
        "slowest_milliseconds": round(1e3 * max(times), 2),
        "mfu": None if utilisation is None else round(utilisation, 4),
        "compile_seconds": round(compiling, 1),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2) if memory else None,
        "loss": round(float(metrics["loss"]), 4),
    }
