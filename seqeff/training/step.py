"""The training step: one compiled function from a state and a batch to the next state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqeff.data import Batch
from seqeff.models import Transformer, parameter_shardings
from seqeff.training.guard import Guard
from seqeff.training.objectives import Objective
from seqeff.training.optimizers import global_norm

State = dict[str, Any]
"""step (int32), parameters, optimizer and guard: everything that a checkpoint holds."""


def make_initialise(
    make_model: Callable[[nnx.Rngs], Transformer],
    optimizer: optax.GradientTransformation,
    guard: Guard,
) -> Callable[[jax.Array], State]:
    """A function from a random key to the state before the first step."""

    def initialise(key: jax.Array) -> State:
        parameters = nnx.to_pure_dict(nnx.split(make_model(nnx.Rngs(key)))[1])
        return {
            "step": jnp.zeros((), jnp.int32),
            "parameters": parameters,
            "optimizer": optimizer.init(parameters),
            "guard": guard.init(),
        }

    return initialise


def state_shardings(state: State, model: Transformer, mesh: Mesh) -> State:
    """Where every array of an abstract state lives: optimizer statistics beside their parameter."""
    parameters = parameter_shardings(model, mesh)
    placed = {tuple(path): sharding for path, sharding in jax.tree.leaves_with_path(parameters)}
    shapes = {
        tuple(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(state["parameters"])
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path)):
            parameter = tuple(path[start:])
            if parameter in placed and shapes[parameter] == leaf.shape:
                return placed[parameter]
        return replicated

    return jax.tree.map_with_path(place, state)


def make_step(
    graph: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    guard: Guard,
    accumulate: int,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """A function from a state and a batch to the next state and the step's metrics.

    A step whose loss or gradient the guard refuses changes nothing but the guard's counts; the
    step counter goes on, so that the next batch is another one.

    Args:
      learning_rate: to report, by number of updates taken.
      accumulate: parts of the batch, one after the other.
    """

    def loss_sums(parameters: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return objective.sums(nnx.merge(graph, parameters), batch)

    def gradients(parameters: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        value = jax.value_and_grad(loss_sums, has_aux=True)
        if accumulate == 1:
            (_, sums), total = value(parameters, batch)
            return total, sums

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            (_, sums), gradient = value(parameters, part)
            return jax.tree.map(jnp.add, carry, (gradient, sums)), None

        parts = jax.tree.map(lambda array: _interleave(array, accumulate), batch)
        first = jax.tree.map(lambda array: array[0], parts)
        shapes = jax.eval_shape(lambda: value(parameters, first))
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1])
        )
        return jax.lax.scan(add, zeros, parts)[0]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        total, sums = gradients(state["parameters"], batch)
        # an all-padding batch has no loss and no gradient, and must not divide by zero
        weight = jnp.maximum(jnp.sum(batch.loss_weights), 1.0)
        total = jax.tree.map(lambda gradient: gradient / weight, total)
        metrics = jax.tree.map(lambda value: value / weight, sums)
        metrics["gradient_norm"] = global_norm(total)
        # the schedule stands still while steps are skipped
        metrics["learning_rate"] = learning_rate(state["step"] - state["guard"]["skipped"])
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(
                total, state["optimizer"], state["parameters"]
            )
            parameters = optax.apply_updates(state["parameters"], updates)
        accept, guard_state = guard.judge(state["guard"], metrics["loss"], metrics["gradient_norm"])
        kept = jax.tree.map(
            lambda new, old: jnp.where(accept, new, old),
            {"parameters": parameters, "optimizer": optimizer_state},
            {"parameters": state["parameters"], "optimizer": state["optimizer"]},
        )
        metrics |= guard.metrics(guard_state)
        return {"step": state["step"] + 1, "guard": guard_state, **kept}, metrics

    return step


def _interleave(array: jax.Array, parts: int) -> jax.Array:
    """[batch, ...] to [parts, batch / parts, ...], each part spread over the devices as before."""
    split = array.reshape(array.shape[0] // parts, parts, *array.shape[1:])
    return jnp.swapaxes(split, 0, 1)
