"""The training step alone: parts of a batch, devices, and steps that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff.checks import ConfigError
from seqeff.data import Batch
from seqeff.training.checkpoints import Checkpoints, CheckpointStore
from seqeff.training.guard import Guard
from seqeff.training.mesh import MeshConfig
from seqeff.training.objectives import NextToken
from seqeff.training.program import Program, check_devices

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, LENGTH, VOCABULARY = 8, 32, 320
WORDS = [chr(65 + index % 50) for index in range(300)]
# float32 sums in another order, after three steps of Adam
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(NextToken):
    """Not finite where a batch begins with id 7."""

    def sums(self, model, batch):
        total, parts = super().sums(model, batch)
        factor = jnp.where(batch.tokens[0, 0] == 7, jnp.inf, 1.0)
        return total * factor, parts


def batch_of(step, padded=0.3):
    """Random tokens whose losses are weighted unevenly over the rows."""
    choose = np.random.default_rng(step)
    tokens = choose.integers(8, 300, (BATCH, LENGTH + 1)).astype(np.int32)
    weights = (choose.random((BATCH, LENGTH)) > padded).astype(np.float32)
    weights[0], weights[1, 3:] = 0, 0
    start = np.zeros((BATCH, LENGTH), np.int32)
    start[:, 20:] = 20
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, start)


def run(config, steps=3, state=None, batches=batch_of):
    """The last state and every step's metrics."""
    program = Program(config, WORDS)
    with jax.set_mesh(program.mesh):
        if state is None:
            state = program.initialise(jax.random.key(0))
        history = []
        for step in range(steps):
            batch = jax.device_put(batches(step), program.batch_sharding)
            state, metrics = program.step(state, batch)
            history.append({name: float(value) for name, value in metrics.items()})
    return program, state, history


def with_mesh(config, **sizes):
    return dataclasses.replace(config, mesh=MeshConfig(**sizes))


@pytest.fixture(scope="module")
def config(tiny):
    return tiny.load(f"Data.batch_size={BATCH}", "Train.objective=@NextToken()")


@pytest.fixture(scope="module")
def alone(config):
    """Three steps on one device, in one part."""
    return run(config)


def assert_alike(history, expected):
    for metrics, wanted in zip(history, expected, strict=True):
        for name in ("loss", "gradient_norm", "learning_rate"):
            np.testing.assert_allclose(metrics[name], wanted[name], **TOLERANCE, err_msg=name)


def test_the_loss_is_the_mean_over_the_weighted_tokens(config, alone):
    program, _, history = alone
    with jax.set_mesh(program.mesh):
        parameters = program.initialise(jax.random.key(0))["parameters"]
        from flax import nnx

        model = nnx.merge(program.graph, parameters)
        batch = batch_of(0)
        logits = model.logits(model(batch.tokens, batch.document_start))
    losses = -jax.nn.log_softmax(logits)[
        np.arange(BATCH)[:, None], np.arange(LENGTH), batch.targets
    ]
    expected = np.sum(losses * batch.loss_weights) / np.sum(batch.loss_weights)
    np.testing.assert_allclose(history[0]["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_add_up_to_it(config, alone, parts):
    assert_alike(run(dataclasses.replace(config, accumulate=parts))[2], alone[2])


def test_a_batch_of_padding_changes_nothing_but_by_decay(config):
    def padding(step):
        return batch_of(step)._replace(loss_weights=np.zeros((BATCH, LENGTH), np.float32))

    _, state, history = run(config, 1, batches=padding)
    assert history[0]["loss"] == 0 and history[0]["gradient_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["parameters"]))


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}],
    ids=str,
)
def test_eight_devices_give_the_losses_of_one(config, alone, sizes):
    program, state, history = run(with_mesh(config, **sizes))
    assert program.mesh.size == 8
    assert_alike(history, alone[2])
    parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    embedding = state["parameters"]["embedding"]
    assert embedding.addressable_shards[0].data.size == embedding.size // parts


def test_a_checkpoint_goes_onto_another_mesh(config, alone, tmp_path):
    spread, state, _ = run(with_mesh(config, data=2, fsdp=2, tensor=2), 2)
    with CheckpointStore(tmp_path, Checkpoints(asynchronous=False)) as store:
        store.save(2, state, {})
        program = alone[0]
        restored, _ = store.restore(2, program.abstract_state)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {1}
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(left, right)
    with jax.set_mesh(program.mesh):
        batch = jax.device_put(batch_of(2), program.batch_sharding)
        _, metrics = program.step(restored, batch)
    np.testing.assert_allclose(metrics["loss"], alone[2][2]["loss"], **TOLERANCE)


def test_a_refused_step_changes_only_the_counts(config):
    poisoned = dataclasses.replace(config, objective=Poisoned(), guard=Guard(window=4))

    def batches(step):
        batch = batch_of(step)
        batch.tokens[0, 0] = 7 if step in (1, 2) else 8
        return batch

    program = Program(poisoned, WORDS)
    with jax.set_mesh(program.mesh):
        state = program.initialise(jax.random.key(0))
        for step in range(4):
            before = jax.device_get({name: state[name] for name in ("parameters", "optimizer")})
            batch = jax.device_put(batches(step), program.batch_sharding)
            state, metrics = program.step(state, batch)
            after = jax.device_get({name: state[name] for name in before})
            same = all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
            assert same == (step in (1, 2))
            assert int(state["step"]) == step + 1
            assert int(metrics["skipped"]) == min(step, 2)
            assert int(metrics["skipped_in_a_row"]) == (0, 1, 2, 0)[step]


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 1, "fsdp": 5}])
def test_a_batch_that_does_not_divide_among_the_devices_is_refused(config, sizes):
    with pytest.raises(ConfigError, match=r"Data\.batch_size = 8 does not divide among the \d"):
        check_devices(with_mesh(config, **sizes))
