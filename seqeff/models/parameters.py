"""How parameters are made, where they live on the mesh, and how activations are kept in place."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float, partition: PartitionSpec
) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution, with its place on the mesh."""
    return nnx.Param(
        std * jax.random.normal(rngs.params(), shape, jnp.float32), partition=partition
    )


def constant(shape: tuple[int, ...], value: float, partition: PartitionSpec) -> nnx.Param:
    """A float32 parameter that starts at one value, with its place on the mesh."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), partition=partition)


def parameter_shardings(module: nnx.Module, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of a module's parameters, as a pure nested dict like the parameters themselves.

    A mesh axis that does not divide a dimension leaves that dimension whole. Parameters that a
    stack of layers put a leading axis on keep that axis whole.
    """

    def place(variable: nnx.Variable) -> NamedSharding:
        shape = variable.get_value().shape
        partition = tuple(variable.get_metadata("partition"))
        partition = (None,) * (len(shape) - len(partition)) + partition
        kept = (
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(partition, shape, strict=True)
        )
        return NamedSharding(mesh, PartitionSpec(*kept))

    state = nnx.split(module)[1]
    placed = jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(placed)


def batch_axes(mesh: jax.sharding.AbstractMesh, size: int) -> tuple[str, ...] | None:
    """The mesh axes that a batch is spread over, or None where they do not divide it."""
    return BATCH_AXES if size % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0 else None


def head_axis(mesh: jax.sharding.AbstractMesh, size: int) -> str | None:
    """The mesh axis that heads are spread over, or None where it does not divide them."""
    return "tensor" if size % mesh.shape["tensor"] == 0 else None


def constrain(array: jax.Array, *partition: Any) -> jax.Array:
    """Keeps an activation's batch on the data axes, and other axes as said, under a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    first = batch_axes(mesh, array.shape[0])
    rest = (
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(partition, array.shape[1:], strict=True)
    )
    return jax.lax.with_sharding_constraint(array, PartitionSpec(first, *rest))


def whole_rows(table: jax.Array) -> jax.Array:
    """A table for looking up rows, with every row in one place under a mesh.

    Rows cut over `fsdp` would make the lookup copy all activations to all devices to join them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return table
    rows = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table, PartitionSpec(rows, None))
