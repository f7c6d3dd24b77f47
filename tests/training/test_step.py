"""The training step alone: parts of a batch, devices, and steps that are refused."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import quick_compilation

from seqeff.checks import ConfigError
from seqeff.data import Batch
from seqeff.training.checkpoints import Checkpoints, CheckpointStore
from seqeff.training.mesh import MeshConfig
from seqeff.training.program import Program

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, LENGTH, VOCABULARY = 8, 32, 320
WORDS = [chr(65 + index % 50) for index in range(300)]
# float32 sums in another order, after three steps of Adam
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def batch_of(step, padded=0.3):
    """Random tokens whose losses are weighted unevenly over the rows."""
    choose = np.random.default_rng(step)
    tokens = choose.integers(8, 300, (BATCH, LENGTH + 1)).astype(np.int32)
    weights = (choose.random((BATCH, LENGTH)) > padded).astype(np.float32)
    weights[0], weights[1, 3:] = 0, 0
    start = np.zeros((BATCH, LENGTH), np.int32)
    start[:, 20:] = 20
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, start)


class Steps(NamedTuple):
    program: Program
    state: dict
    history: list


def run(config, steps=3):
    program = Program(config, WORDS)
    with jax.set_mesh(program.mesh):
        state = program.initialise(jax.random.key(0))
    return advance(program, state, range(steps))


def advance(program, state, steps, batches=batch_of):
    """Takes steps, without giving the state away."""
    state, history = jax.tree.map(jnp.copy, state), []
    with jax.set_mesh(program.mesh):
        for step in steps:
            batch = jax.device_put(batches(step), program.batch_sharding)
            state, metrics = program.step(state, batch)
            history.append({name: float(value) for name, value in metrics.items()})
    return Steps(program, state, history)


def with_mesh(config, **sizes):
    return dataclasses.replace(config, mesh=MeshConfig(**sizes))


@pytest.fixture(scope="module")
def config(tiny):
    return tiny.load(f"Data.batch_size={BATCH}")


@pytest.fixture(scope="module")
def alone(config, compilation_cache):
    """Three steps on one device, in one part."""
    with quick_compilation(compilation_cache):
        return run(config)


@pytest.fixture(scope="module")
def spread(config, compilation_cache):
    """The same steps on eight devices."""
    with quick_compilation(compilation_cache):
        return run(with_mesh(config, data=2, fsdp=2, tensor=2))


def assert_alike(history, expected):
    for metrics, wanted in zip(history, expected, strict=True):
        for name in ("loss", "gradient_norm", "learning_rate"):
            np.testing.assert_allclose(metrics[name], wanted[name], **TOLERANCE, err_msg=name)


def test_the_loss_is_the_mean_over_the_weighted_tokens(config, alone):
    program, _, history = alone
    with jax.set_mesh(program.mesh):
        parameters = program.initialise(jax.random.key(0))["parameters"]
        model = nnx.merge(program.graph, parameters)
        batch = batch_of(0)
        logits = model.logits(model(batch.tokens, batch.document_start))
    losses = -jax.nn.log_softmax(logits)[
        np.arange(BATCH)[:, None], np.arange(LENGTH), batch.targets
    ]
    expected = np.sum(losses * batch.loss_weights) / np.sum(batch.loss_weights)
    np.testing.assert_allclose(history[0]["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("parts", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_parts_of_a_batch_add_up_to_it(config, alone, parts):
    assert_alike(run(dataclasses.replace(config, accumulate=parts)).history, alone.history)


def test_a_batch_of_padding_has_no_loss_and_no_gradient(alone):
    def padding(step):
        return batch_of(step)._replace(loss_weights=np.zeros((BATCH, LENGTH), np.float32))

    _, state, history = advance(alone.program, alone.state, [0], padding)
    assert history[0]["loss"] == 0
    assert history[0]["gradient_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["parameters"]))


def test_eight_devices_give_the_losses_of_one(alone, spread):
    assert_alike(spread.history, alone.history)
    assert spread.program.mesh.size == 8
    embedding = spread.state["parameters"]["embedding"]
    assert embedding.addressable_shards[0].data.size == embedding.size // 4


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 4, "tensor": 2}])
def test_every_axis_gives_the_losses_of_one_device(config, alone, sizes):
    assert_alike(run(with_mesh(config, **sizes)).history, alone.history)


def test_a_checkpoint_goes_onto_another_mesh(alone, spread, tmp_path):
    with CheckpointStore(tmp_path, Checkpoints(asynchronous=False)) as store:
        store.save(3, spread.state, {})
        restored, _ = store.restore(3, alone.program.abstract_state)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {1}
    for left, right in zip(jax.tree.leaves(spread.state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(left, right)
    assert_alike(
        advance(alone.program, restored, [3]).history,
        advance(spread.program, spread.state, [3]).history,
    )


def test_a_refused_step_changes_only_the_counts(alone):
    def batches(step):
        batch = batch_of(step)
        batch.loss_weights[3, 3] = np.nan if step in (1, 2) else 1
        return batch

    with jax.set_mesh(alone.program.mesh):
        state = alone.program.initialise(jax.random.key(0))
    for step in range(4):
        _, after, (metrics,) = advance(alone.program, state, [step], batches)
        for name in ("parameters", "optimizer"):
            leaves = jax.tree.leaves(state[name]), jax.tree.leaves(after[name])
            assert all(map(np.array_equal, *leaves)) == (step in (1, 2))
        assert int(after["step"]) == step + 1
        assert metrics["skipped"] == min(step, 2)
        assert metrics["skipped_in_a_row"] == (0, 1, 2, 0)[step]
        state = after


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 1, "fsdp": 5}])
def test_a_batch_that_does_not_divide_among_the_devices_is_refused(config, sizes):
    with pytest.raises(ConfigError, match=r"Data\.batch_size = 8 does not divide among the \d"):
        Program(with_mesh(config, **sizes), WORDS)
