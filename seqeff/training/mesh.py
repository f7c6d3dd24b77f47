"""The one device mesh of a run, and many hosts, through JAX."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqeff.checks import ConfigError, UserError, check_types, require

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of all processes are arranged.

    One axis may be -1: what the others leave. A product below the number of devices takes the
    first ones, in one process only.

    Attributes:
      data: copies of the parameters, each for a part of the batch.
      fsdp: parts of the batch that also share out the parameters between them.
      tensor: parts of each layer's matrices and heads.
      distributed: join the other processes of a cluster. Slurm, Open MPI, Kubernetes and TPU pods
        are recognised; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID. A set JAX_COORDINATOR_ADDRESS also joins.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    distributed: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            require(size == -1 or size >= 1, f"MeshConfig.{axis} = {size} must be -1 or at least 1")
        require(sizes.count(-1) <= 1, "MeshConfig: only one of data, fsdp, tensor can be -1")

    def initialise_distributed(self) -> None:
        """Joins the other processes where this is configured; before any other use of JAX.

        Raises:
          ConfigError: the cluster could not be found or joined.
        """
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        if jax.distributed.is_initialized() or not (self.distributed or address):
            return
        try:
            count, index = (
                int(value) if (value := os.environ.get(name)) else None
                for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
            )
            jax.distributed.initialize(num_processes=count, process_id=index)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot join the other processes (MeshConfig.distributed = {self.distributed}, "
                f"JAX_COORDINATOR_ADDRESS = {address}): {error}"
            ) from error

    def make(self) -> Mesh:
        """A mesh over the devices with the axes data, fsdp and tensor, placed by the compiler.

        Raises:
          ConfigError: the axes' sizes do not make up the devices.
          UserError: there is no device.
        """
        devices = find_devices()
        sizes = [getattr(self, axis) for axis in AXES]
        given = math.prod(size for size in sizes if size != -1)
        asked = f"MeshConfig.data, fsdp, tensor = {', '.join(map(str, sizes))}"
        if -1 in sizes:
            require(
                len(devices) % given == 0,
                f"{asked}: their product {given} does not divide the {len(devices)} devices",
            )
            sizes[sizes.index(-1)] = len(devices) // given
        require(
            math.prod(sizes) <= len(devices),
            f"{asked} needs {math.prod(sizes)} devices; there are {len(devices)}",
        )
        require(
            math.prod(sizes) == len(devices) or jax.process_count() == 1,
            f"{asked} uses {math.prod(sizes)} of {len(devices)} devices; with many processes all "
            "must be used",
        )
        return jax.make_mesh(
            tuple(sizes),
            AXES,
            axis_types=(AxisType.Auto,) * len(AXES),
            devices=devices[: math.prod(sizes)],
        )


def find_devices() -> list[Any]:
    """The devices of all processes.

    Raises:
      UserError: there is none.
    """
    try:
        return jax.devices()
    # jax raises the latter where a platform was asked for that none of its plugins offers
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        reason = str(error).strip().partition("\n")[0] or "none of that platform is here"
        raise UserError(
            f"no device is found (JAX_PLATFORMS = {asked}): {reason}; unset JAX_PLATFORMS, or see "
            "`seqeff info`"
        ) from error


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
