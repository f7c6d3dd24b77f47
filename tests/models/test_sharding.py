"""Parameters and batch spread over eight devices against one device."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from model_cases import (
    ATTENTIONS,
    documents,
    extending,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)

from seqeff.models import (
    HeadProjections,
    LowRankLinear,
    cross_entropy_sums,
    empty_cache,
    parameter_shardings,
)

CONFIG = small_config(vocabulary_size=98, attention=ATTENTIONS["separator"])


def make_mesh(data, fsdp, tensor):
    return jax.make_mesh(
        (data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )


def sharded(config, mesh):
    """Graph, and parameters with their shardings, of a model."""
    graph, parameters = random_model(config)
    shardings = parameter_shardings(nnx.merge(graph, parameters), mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(parameters)
    return graph, parameters, shardings


def test_parameters_are_where_they_should_be():
    config = dataclasses.replace(
        CONFIG, projections=HeadProjections(heads=4, kv_heads=1, output=LowRankLinear(rank=3))
    )
    _, _, shardings = sharded(config, make_mesh(1, 2, 4))
    specs = jax.tree.map(lambda sharding: tuple(sharding.spec), shardings)
    layers = specs["layers"]
    assert specs["embedding"] == specs["output_head"] == (None, "fsdp")  # 4 does not divide 98
    assert specs["final_norm"]["scale"] == (None,)
    assert layers["attention_norm"]["scale"] == (None, None)
    assert layers["projections"]["query"] == {
        "kernel": (None, "fsdp", "tensor"),
        "bias": (None, "tensor"),
    }
    assert layers["projections"]["output"] == {
        "down": (None, "tensor", None),
        "up": (None, None, "fsdp"),
        "bias": (None, "fsdp"),
    }
    assert layers["feed_forward"]["up"]["kernel"] == (None, "fsdp", "tensor")
    assert layers["feed_forward"]["down"]["kernel"] == (None, "tensor", "fsdp")


def step(mesh, function_of=jax.value_and_grad):
    """What `function_of` makes of the loss, on one device or spread over a mesh."""
    graph, parameters, shardings = sharded(CONFIG, make_mesh(1, 1, 1) if mesh is None else mesh)
    tokens = random_tokens(4, 63)
    starts = documents(63, (0, 30), (0,), (0, 1, 2), (0,))
    batch = tokens, starts, (tokens % 3 > 0).astype(np.float32)

    def loss(parameters, tokens, starts, weights):
        model = nnx.merge(graph, parameters)
        states = model(tokens, starts)
        targets = jnp.roll(tokens, -1, axis=1)
        return cross_entropy_sums(states, model.head(), targets, weights, 1e-3)[0]

    function = quick_jit(function_of(loss))
    if mesh is None:
        return function(parameters, *batch)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return function(jax.device_put(parameters, shardings), *jax.device_put(batch, rows))


@pytest.fixture(scope="module")
def one_device():
    return step(None)


def test_loss_and_gradients_equal_those_of_one_device(one_device):
    """To 1e-5 of the loss and, with sums in another order, 1e-4 of a gradient's largest entry."""
    loss, gradients = step(make_mesh(2, 2, 2))
    np.testing.assert_allclose(loss, one_device[0], rtol=1e-5)
    for actual, expected in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(one_device[1]), strict=True
    ):
        largest = float(np.max(np.abs(expected)))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * largest)


def test_loss_where_the_key_heads_cannot_be_spread(one_device):
    loss = step(make_mesh(1, 2, 4), function_of=lambda loss: loss)
    np.testing.assert_allclose(loss, one_device[0], rtol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (2, 1, 4)], ids=str)
def test_decoding_equals_that_on_one_device(sizes):
    """In chunks and by tokens; 4 devices do not divide the key heads."""
    config = dataclasses.replace(CONFIG, attention=ATTENTIONS["compact"])
    _, parameters, shardings = sharded(config, make_mesh(*sizes))
    tokens = random_tokens(4, 24)
    expected, _ = extending(config, parameters)(tokens, empty_cache(config, 4, 24))
    with jax.set_mesh(make_mesh(*sizes)):
        extend = extending(config, jax.device_put(parameters, shardings))
        cache, outputs = empty_cache(config, 4, 24), []
        for first, end in itertools.pairwise((0, 20, 21, 22, 23, 24)):
            output, cache = extend(tokens[:, first:end], cache)
            outputs.append(output)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, atol=2e-5)
