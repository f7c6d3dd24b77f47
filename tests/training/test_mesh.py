import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from seqeff.checks import ConfigError
from seqeff.training.mesh import MeshConfig, batch_sharding, replicated


def test_the_tests_have_eight_devices() -> None:
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1), (1, 1, 1)),
        (MeshConfig(data=1, fsdp=3, tensor=2), (1, 3, 2)),
    ],
)
def test_sizes(config: MeshConfig, sizes: tuple[int, ...]) -> None:
    mesh = config.make()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert mesh.shape == dict(zip(mesh.axis_names, sizes, strict=True))


def test_batch_is_split_over_data_and_fsdp() -> None:
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).make()
    batch = jax.device_put(np.arange(24).reshape(8, 3), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    scalar = jax.device_put(jnp.float32(1), replicated(mesh))
    assert scalar.sharding.is_fully_replicated


def test_a_step_under_the_mesh() -> None:
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).make()
    batch = np.random.default_rng(0).normal(size=(8, 63)).astype(np.float32)
    weights = np.ones((63, 10), np.float32)

    @jax.jit
    def loss(batch: jax.Array, weights: jax.Array) -> jax.Array:
        product = jax.lax.with_sharding_constraint(
            batch @ weights, PartitionSpec(("data", "fsdp"), "tensor")
        )
        return jnp.sum(product**2)

    with jax.set_mesh(mesh):
        sharded = loss(jax.device_put(batch, batch_sharding(mesh)), weights)
    np.testing.assert_allclose(sharded, np.sum((batch @ weights) ** 2), rtol=1e-5)


def test_bad_sizes() -> None:
    with pytest.raises(ConfigError, match="product 3 does not divide the 8 devices"):
        MeshConfig(fsdp=3).make()
    with pytest.raises(ConfigError, match="needs 16 devices; there are 8"):
        MeshConfig(data=2, fsdp=8).make()
    with pytest.raises(ConfigError, match="only one of"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match=r"MeshConfig.tensor = 0"):
        MeshConfig(tensor=0)


def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    MeshConfig().initialise_distributed()
    assert not jax.distributed.is_initialized()


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS = localhost:1"):
        MeshConfig(distributed=True).initialise_distributed()
    assert not jax.distributed.is_initialized()
