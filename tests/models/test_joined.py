"""Layers joined for decoding give what the model's own layers give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqeff.models import (
    CachedTransformer,
    DenseLinear,
    FeedForward,
    HeadProjections,
    LayerNorm,
    LowRankLinear,
    NormalInitialisation,
    RMSNorm,
    TransformerConfig,
    cached_parameters,
    empty_cache,
)
from seqeff.models.joined import joins

CONFIG = TransformerConfig(
    vocabulary_size=61,
    width=32,
    layers=2,
    residual="parallel",
    projections=HeadProjections(heads=4),
    feed_forward=FeedForward(hidden=48),
    initialisation=NormalInitialisation(std=0.3),
    dtype="float32",
)
VARIANTS = {
    "biases everywhere": {},
    "gated, no bias, root mean square": {
        "norm": RMSNorm(),
        "projections": HeadProjections(heads=4, bias=False),
        "feed_forward": FeedForward(hidden=40, gated=True, activation="silu", bias=False),
    },
    "grouped heads wider than the model": {
        "projections": HeadProjections(heads=6, kv_heads=2, head_dim=10, output_bias=False),
        "tie_embeddings": True,
    },
}
NOT_JOINED = {
    "one after the other": {"residual": "sequential"},
    "norms of heads": {"projections": HeadProjections(heads=4, head_norm=RMSNorm())},
    "low rank": {"feed_forward": FeedForward(hidden=48, down=LowRankLinear(rank=4))},
}


def parameters_of(config):
    """Graph and parameters, with norms and biases that are not 1 and 0."""
    graph, state = nnx.split(config.make(nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return graph, tree.unflatten(moved)


def states(config, graph, parameters):
    """Of whole rows, and of the same tokens through the cache, five and then eight."""
    tokens = jax.random.randint(jax.random.key(2), (3, 13), 0, config.vocabulary_size)
    whole = nnx.merge(graph, parameters)(tokens)
    model = CachedTransformer.of(config, cached_parameters(config, parameters))
    first, cache = model.extend(tokens[:, :5], empty_cache(config, 3, 13))
    last, _ = model.extend(tokens[:, 5:], cache)
    return whole, jnp.concatenate([first, last], axis=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_states_are_those_of_whole_rows(name):
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    assert joins(config)
    graph, parameters = parameters_of(config)
    joined = cached_parameters(config, parameters)["layers"][0]
    assert {part: sorted(of) for part, of in joined.items()} == {
        "into": ["bias", "kernel"],
        "out": ["bias", "kernel"],
    }
    whole, cached = states(config, graph, parameters)
    np.testing.assert_allclose(cached, whole, atol=2e-5)


@pytest.mark.parametrize("name", NOT_JOINED)
def test_other_layers_stay_apart(name):
    config = dataclasses.replace(CONFIG, **NOT_JOINED[name])
    assert not joins(config)
    graph, parameters = parameters_of(config)
    assert "projections" in cached_parameters(config, parameters)["layers"][0]
    whole, cached = states(config, graph, parameters)
    np.testing.assert_allclose(cached, whole, atol=2e-5)


def test_norms_of_another_kind_stay_apart():
    @dataclasses.dataclass(frozen=True)
    class Other:
        def make(self, width):
            return LayerNorm().make(width)

    assert not joins(dataclasses.replace(CONFIG, norm=Other()))
    assert joins(
        dataclasses.replace(
            CONFIG, norm=LayerNorm(), feed_forward=FeedForward(hidden=48, up=DenseLinear())
        )
    )


def test_rounding_is_no_worse_than_that_of_layers_apart():
    graph, parameters = parameters_of(CONFIG)
    exact, _ = states(CONFIG, graph, parameters)
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    apart, joined = states(low, nnx.split(low.make(nnx.Rngs(0)))[0], parameters)
    errors = [float(jnp.linalg.norm(x.astype(jnp.float32) - exact)) for x in (joined, apart)]
    assert errors[0] < 1.3 * errors[1]
