"""What a config becomes before the first step: data, shapes, and compiled functions."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax._src import xla_bridge
from jax.sharding import Mesh

from seqeff.checks import ConfigError, UserError, require
from seqeff.data import Batch, PreparedData, Tokenizer, prepare
from seqeff.models import TransformerConfig
from seqeff.models.flops import abstract_model, attended_entries, training_flops_per_token
from seqeff.runs import RunDirectory, write_atomically
from seqeff.training.config import Train
from seqeff.training.mesh import batch_sharding
from seqeff.training.step import State, make_initialise, make_step, state_shardings

_DETERMINISTIC = "--xla_gpu_deterministic_ops"
_MOST_EPOCHS = 100


class Program:
    """What a config compiles to: the state's shapes and places, and the functions on it."""

    def __init__(self, config: Train, vocabulary: Sequence[str]) -> None:
        """
        Args:
          vocabulary: decoded text of every token id.

        Raises:
          ConfigError: the model, the tokenizer, the batch and the devices do not fit each other.
          UserError: there is no device.
        """
        self.model = model = run_model(config, vocabulary)
        self.mesh = config.mesh.make()
        _require_equal_parts(config.data.batch_size, self.mesh)
        abstract = abstract_model(model)
        self.graph, parameters = nnx.split(abstract)
        learning_rate = config.schedule.make(config.optimizer.learning_rate, config.steps)
        optimizer = config.optimizer.make(
            config.schedule.make(1.0, config.steps), nnx.to_pure_dict(parameters)
        )
        initialise = make_initialise(model.make, optimizer, config.guard)
        state = jax.eval_shape(initialise, jax.random.key(0))
        shardings = state_shardings(state, abstract, self.mesh)
        self.batch_sharding = batch_sharding(self.mesh)
        self.abstract_state: State = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )
        self._trace(config)
        self.initialise = jax.jit(initialise, out_shardings=shardings)
        self.step = jax.jit(
            make_step(
                self.graph,
                config.objective,
                optimizer,
                learning_rate,
                config.guard,
                config.accumulate,
            ),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )

    def _trace(self, config: Train) -> None:
        """Runs the model on shapes, so that it refuses now what it cannot do here."""

        def run(parameters: nnx.State, batch: Batch) -> jax.Array:
            return nnx.merge(self.graph, parameters)(batch.tokens, batch.document_start)

        with jax.set_mesh(self.mesh):
            jax.eval_shape(run, self.abstract_state["parameters"], abstract_batch(self, config))


def _require_equal_parts(batch_size: int, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    require(
        batch_size % parts == 0,
        f"Data.batch_size = {batch_size} does not divide among the {parts} devices of "
        "MeshConfig.data and fsdp",
    )


def run_model(config: Train, vocabulary: Sequence[str]) -> TransformerConfig:
    """The config's model, knowing its vocabulary and whether the run is deterministic."""
    model = config.model.for_vocabulary(vocabulary)
    if config.deterministic:
        model = dataclasses.replace(model, embedding_gradient="matmul")
    return model


def prepare_backend(config: Train) -> None:
    """Joins other hosts and sets what must be set before the first use of a device.

    Raises:
      ConfigError: `XLA_FLAGS` forbids what `Train.deterministic` asks for.
      UserError: it is too late to set it, or the other hosts cannot be joined.
    """
    if config.deterministic:
        _ask_determinism()
    config.mesh.initialise_distributed()


def _ask_determinism() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    given = [flag for flag in flags.split() if flag.partition("=")[0] == _DETERMINISTIC]
    for flag in given:
        _, equals, value = flag.partition("=")
        if equals and value.lower() not in ("true", "1"):
            raise ConfigError(
                f"Train.deterministic = True, but XLA_FLAGS has {flag}; take that flag away, or "
                "set Train.deterministic = False"
            )
    if given:
        return
    if xla_bridge.backends_are_initialized() and jax.default_backend() == "gpu":
        raise UserError(
            "Train.deterministic = True cannot be had in a process whose GPUs are in use without "
            f"it; start a new process for this config, or set XLA_FLAGS={_DETERMINISTIC}=true"
        )
    os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}=true".strip()


def prepare_for(config: Train, run: RunDirectory) -> PreparedData:
    """The data; for a run that was begun, with its own tokenizer, and checked to be the same."""
    if not run.exists():
        return prepare_new(config)
    return prepare(config.data, Tokenizer.load(run.tokenizer), run.data_fingerprint())


def prepare_new(config: Train) -> PreparedData:
    """The data of a run that is to begin; with the tokenizer of its parent, if it has one.

    Raises:
      UserError: the parent is no run.
    """
    if config.parent is None:
        return prepare(config.data)
    return prepare(config.data, Tokenizer.load(RunDirectory(config.parent).require().tokenizer))


def keep_data(prepared: PreparedData, run: RunDirectory) -> None:
    """Writes the tokenizer and the documents' fingerprint to a run that is about to begin."""
    with run.writing():
        run.tokenizer.mkdir(exist_ok=True)
        prepared.tokenizer.save(run.tokenizer)
        write_atomically(run.data, json.dumps(prepared.fingerprint, indent=2) + "\n")


def unlikely_epochs(config: Train, prepared: PreparedData) -> str | None:
    """A warning, where a run would read its documents far more often than makes sense."""
    tokens = sum(store.part.tokens for store in prepared.train_stores)
    epochs = config.steps * config.tokens_per_step / max(tokens, 1)
    if epochs <= _MOST_EPOCHS:
        return None
    return (
        f"warning: these are {epochs:,.0f} epochs of {tokens:,} training tokens; give Data.source "
        "more text, or lower Train.steps"
    )


def flops_per_token(model: TransformerConfig, prepared: PreparedData) -> float:
    """FLOPs of forward and backward a token, with the attention measured on the first batch."""
    batch = prepared.train.rows(0, 0, min(prepared.train.batch_size, 8))
    return training_flops_per_token(
        model, attended_entries(model, batch.tokens, batch.document_start)
    )


def abstract_batch(program: Program, config: Train) -> Batch:
    """Shapes of a training batch on the mesh."""
    data = config.data

    def array(dtype: type) -> jax.ShapeDtypeStruct:
        shape = (data.batch_size, data.sequence_length)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=program.batch_sharding)

    return Batch(
        tokens=array(jnp.int32),
        targets=array(jnp.int32),
        loss_weights=array(jnp.float32),
        document_start=array(jnp.int32) if data.separate_documents else None,
    )
