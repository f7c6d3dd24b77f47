"""Linear maps, norms, feed-forward and head projections against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from model_cases import quick_jit, random_model, random_tokens, small_config

from seqeff.checks import ConfigError
from seqeff.models import (
    DenseLinear,
    FeedForward,
    HeadProjections,
    LayerNorm,
    LowRankLinear,
    NoPositions,
    NormalInitialisation,
    RMSNorm,
)

X = np.random.default_rng(0).normal(2, 3, (2, 5, 8)).astype(np.float32)


def made(config, *arguments):
    """A layer with random parameters in place of its own, and them."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.make(*arguments, nnx.Rngs(0))))
    random = np.random.default_rng(1)
    state = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state)
    )
    return nnx.merge(graph, state), state


def test_norms():
    for config in (LayerNorm(epsilon=0.5), RMSNorm(epsilon=0.5)):
        graph, state = nnx.split(nnx.eval_shape(lambda config=config: config.make(8)))
        state = {name: np.arange(8.0, dtype=np.float32) for name in nnx.to_pure_dict(state)}
        actual = nnx.merge(graph, state)(X)
        if isinstance(config, LayerNorm):
            centred = X - X.mean(-1, keepdims=True)
            expected = centred / np.sqrt(X.var(-1, keepdims=True) + 0.5) * np.arange(8) + np.arange(
                8
            )
        else:
            expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.5) * np.arange(8)
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_norms_compute_in_float32():
    graph = nnx.split(nnx.eval_shape(lambda: RMSNorm().make(256)))[0]
    x = np.full((1, 256), 300, jax.numpy.bfloat16)
    # in bfloat16 a sum of 256 squares would be far from the truth
    normed = nnx.merge(graph, {"scale": np.ones(256, np.float32)})(x)
    assert normed.dtype == x.dtype
    np.testing.assert_array_equal(normed, 1)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(activation, gated):
    config = FeedForward(hidden=12, activation=activation, gated=gated)
    layer, state = made(config, 8, 2, NormalInitialisation())
    assert set(state) == {"up", "gate", "down"} - ({"gate"} if not gated else set())

    def gelu(x):
        return x * np.vectorize(lambda value: (1 + math.erf(value / math.sqrt(2))) / 2)(x)

    def gelu_tanh(x):
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    function = {
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }[activation]

    def linear(x, name):
        return x @ state[name]["kernel"].astype(np.float64) + state[name]["bias"]

    up = linear(X, "up")
    inner = function(linear(X, "gate")) * up if gated else function(up)
    np.testing.assert_allclose(layer(X), linear(inner, "down"), rtol=1e-4, atol=1e-3)


def test_gelu_of_bfloat16_is_rounded_once():
    """A half of bfloat16's last place from the truth, and float32's own error beside it."""
    x = jnp.linspace(-8, 8, 4001).astype(jnp.bfloat16)
    exact = [float(v) * (1 + math.erf(float(v) / math.sqrt(2))) / 2 for v in x]
    found = FeedForward(hidden=1).activate(x, None)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_heads_of_one_key_head_are_adjacent():
    config = HeadProjections(heads=6, kv_heads=2, head_dim=4, bias=False)
    layer, state = made(config, 8, 2, NormalInitialisation())
    queries, keys, values = layer.split(X)
    assert (queries.shape, keys.shape, values.shape) == ((2, 5, 6, 4), (2, 5, 2, 4), (2, 5, 2, 4))
    kernel = state["query"]["kernel"]
    np.testing.assert_allclose(queries[:, :, 3], X @ kernel[:, 12:16], rtol=1e-4, atol=1e-4)
    merged = layer.merge(queries)
    expected = np.asarray(queries).reshape(2, 5, 24) @ state["output"]["kernel"]
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)


def test_a_head_norm_is_of_queries_and_keys_alone():
    config = HeadProjections(heads=4, kv_heads=2, head_norm=RMSNorm(epsilon=0.5))
    layer, state = made(config, 8, 2, NormalInitialisation())
    bare, _ = made(HeadProjections(heads=4, kv_heads=2), 8, 2, NormalInitialisation())
    nnx.update(bare, {name: state[name] for name in ("query", "key", "value", "output")})
    actual, projected = layer.split(X), bare.split(X)
    for part, name in enumerate(("query_norm", "key_norm")):
        square = np.square(projected[part]).mean(-1, keepdims=True)
        expected = projected[part] / np.sqrt(square + 0.5) * state[name]["scale"]
        np.testing.assert_allclose(actual[part], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(actual[2], projected[2])


@pytest.mark.parametrize(("bias", "output_bias"), [(True, None), (False, None), (False, True)])
def test_biases_are_where_they_are_asked_for(bias, output_bias):
    config = HeadProjections(heads=2, bias=bias, output_bias=output_bias)
    _, state = made(config, 8, 2, NormalInitialisation())
    assert ["bias" in state[name] for name in ("query", "key", "value", "output")] == [
        *(bias, bias, bias),
        bias if output_bias is None else output_bias,
    ]


def test_low_rank_is_the_product_of_its_factors():
    graph, state = nnx.split(
        nnx.eval_shape(
            lambda: LowRankLinear(rank=3).make(
                8, 6, bias=True, std=0.02, partition=PartitionSpec(None, None), rngs=nnx.Rngs(0)
            )
        )
    )
    random = np.random.default_rng(1)
    state = {
        name: random.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in nnx.to_pure_dict(state).items()
    }
    assert (state["down"].shape, state["up"].shape) == ((8, 3), (3, 6))
    expected = X @ (state["down"] @ state["up"]) + state["bias"]
    np.testing.assert_allclose(nnx.merge(graph, state)(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("linear", [DenseLinear(), LowRankLinear(rank=64)])
def test_the_whole_map_starts_with_the_standard_deviation_asked_for(linear):
    def make():
        layer = linear.make(
            256, 192, bias=True, std=0.03, partition=PartitionSpec(None, None), rngs=nnx.Rngs(5)
        )
        return nnx.to_pure_dict(nnx.split(layer)[1])

    state = quick_jit(make)()
    whole = state["kernel"] if "kernel" in state else state["down"] @ state["up"]
    assert np.std(whole) == pytest.approx(0.03, rel=0.03)
    assert np.mean(whole) == pytest.approx(0, abs=0.002)
    assert not np.any(state["bias"])


def test_every_projection_can_be_low_rank_and_learns():
    low = LowRankLinear(rank=4)
    config = small_config(
        projections=HeadProjections(
            heads=4, kv_heads=2, bias=False, query=low, key=low, value=low, output=low
        ),
        feed_forward=FeedForward(
            hidden=48, activation="silu", gated=True, bias=False, up=low, gate=low, down=low
        ),
        positions=NoPositions(),
        attention_backend="reference",
    )
    graph, parameters = random_model(config)
    tokens, target = random_tokens(2, 21), np.random.default_rng(2).normal(size=(2, 21, 32))

    def loss(parameters):
        return ((nnx.merge(graph, parameters)(tokens) - target) ** 2).mean()

    gradient = quick_jit(jax.grad(loss))(parameters)["layers"]
    for part, names in (
        ("projections", ("query", "key", "value", "output")),
        ("feed_forward", ("up", "gate", "down")),
    ):
        assert set(gradient[part]) == set(names)
        for name in names:
            factors = gradient[part][name]
            assert set(factors) == {"down", "up"}
            assert factors["down"].shape[-1] == factors["up"].shape[-2] == 4
            for factor in factors.values():
                assert np.all(np.any(factor != 0, axis=(1, 2))), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLinear(rank=0), "LowRankLinear.rank = 0 must be at least 1"),
        (lambda: FeedForward(hidden=0), "FeedForward.hidden = 0 must be at least 1"),
        (
            lambda: FeedForward(hidden=4, activation="swish"),
            "FeedForward.activation = 'swish' is of type str; give 'gelu' or 'gelu_tanh'",
        ),
        (lambda: LayerNorm(epsilon=0.0), "LayerNorm.epsilon = 0.0 must be positive"),
        (lambda: RMSNorm(epsilon=-1.0), "RMSNorm.epsilon = -1.0 must be positive"),
        (lambda: HeadProjections(heads=0), "HeadProjections.heads = 0 must be at least 1"),
        (
            lambda: HeadProjections(heads=4, kv_heads=3),
            "HeadProjections.kv_heads = 3 must divide heads = 4",
        ),
        (
            lambda: HeadProjections(heads=4, kv_heads=0),
            "HeadProjections.kv_heads = 0 must divide heads = 4",
        ),
        (
            lambda: HeadProjections(heads=4, head_dim=0),
            "HeadProjections.head_dim = 0 must be at least 1",
        ),
        (
            lambda: HeadProjections(heads=4, query=DenseLinear),
            "HeadProjections.query = <class 'seqeff.models.linear.DenseLinear'> is of type type",
        ),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)
