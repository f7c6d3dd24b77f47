"""The model's config: what it refuses, counts and initialises."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from model_cases import ATTENTIONS, quick_jit, small_config

from seqeff.checks import ConfigError
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    LayerNorm,
    LearnedPositions,
    LowRankLinear,
    NormalInitialisation,
    SeparatorAttention,
    SmallInitialisation,
    TransformerConfig,
)
from seqeff.models.flops import (
    forward_flops_per_token,
    matmul_parameters,
    parameter_count,
    training_flops_per_token,
)

LARGE = {
    "width": 128,
    "layers": 4,
    "vocabulary_size": 300,
    "feed_forward": FeedForward(hidden=256, activation="silu", gated=True),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "TransformerConfig.layers = 0 must be at least 1"),
        ({"width": 0}, "TransformerConfig.width = 0 must be at least 1"),
        ({"vocabulary_size": 0}, "TransformerConfig.vocabulary_size = 0 must be at least 1"),
        ({"unroll": 0}, "TransformerConfig.unroll = 0 must be at least 1"),
        (
            {"width": 30},
            "HeadProjections.heads = 4 must divide TransformerConfig.width = 30, or "
            "HeadProjections.head_dim must be given",
        ),
        (
            {"layer_attention": {2: DenseAttention()}},
            "TransformerConfig.layer_attention names layer 2; there are 2",
        ),
        (
            {"layer_attention": {-3: DenseAttention()}},
            "TransformerConfig.layer_attention names layer -3; there are 2",
        ),
        (
            {"layer_attention": {-1: DenseAttention(), 1: DenseAttention(window=2)}},
            "TransformerConfig.layer_attention names one layer as -1 and as 1; keep one",
        ),
        ({"attention": LayerNorm()}, "TransformerConfig.attention = LayerNorm(epsilon=1e-05) is"),
        ({"layer_attention": {"0": DenseAttention()}}, "TransformerConfig.layer_attention = {'0'"),
        ({"norm": DenseAttention()}, "TransformerConfig.norm = DenseAttention(window=None) is of"),
        ({"dtype": "float64"}, "TransformerConfig.dtype = 'float64' is of type str; give 'bfloat"),
        ({"residual": "both"}, "TransformerConfig.residual = 'both' is of type str; give 'sequen"),
        ({"tie_embeddings": 1}, "TransformerConfig.tie_embeddings = 1 is of type int; give bool"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ConfigError) as error:
        small_config(**changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DenseAttention(window=0), "DenseAttention.window = 0 must be at least 1, or null"),
        (lambda: NormalInitialisation(std=0.0), "NormalInitialisation.std = 0.0 must be positive"),
        (
            lambda: small_config().for_vocabulary(["a"] * 98),
            "TransformerConfig.vocabulary_size = 97 is below the tokenizer's 98 tokens",
        ),
        (
            lambda: parameter_count(
                small_config(feed_forward=FeedForward(hidden=48, up=LowRankLinear(rank=33)))
            ),
            "LowRankLinear.rank = 33 exceeds the 32 x 48 projection it factors; give at most 32",
        ),
    ],
)
def test_bad_parts(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)


def test_the_vocabulary_reaches_every_attention():
    config = small_config(
        layers=3,
        attention=SeparatorAttention(characters="x"),
        layer_attention={0: DenseAttention(), -1: SeparatorAttention(characters="y")},
    ).for_vocabulary(["x", "y"])
    assert [getattr(attention, "separator_ids", None) for attention in config.attentions()] == [
        *(None, (0,), (1,))
    ]


def test_neighbours_that_attend_alike_are_one_run():
    dense, other = DenseAttention(), ATTENTIONS["separator"]

    def runs(layers, **layer_attention):
        given = {int(layer[1:].replace("m", "-")): way for layer, way in layer_attention.items()}
        config = small_config(layers=layers, attention=other, layer_attention=given)
        return [(attention, first, end) for attention, first, end in config.runs()]

    assert runs(4) == [(other, 0, 4)]
    assert runs(4, l0=dense, lm1=dense) == [(dense, 0, 1), (other, 1, 3), (dense, 3, 4)]
    assert runs(4, l1=dense, lm2=dense) == [(other, 0, 1), (dense, 1, 3), (other, 3, 4)]
    assert runs(2, l0=dense, lm1=dense) == [(dense, 0, 2)]
    assert runs(1, lm1=dense) == [(dense, 0, 1)]


def test_a_model_and_its_config_can_be_keys():
    config = small_config(layer_attention={0: DenseAttention(window=3)})
    assert {config: 1}[dataclasses.replace(config)] == 1
    assert config != dataclasses.replace(config, layer_attention={})
    graph = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))[0]
    assert isinstance(hash(graph), int)


def test_a_config_starts_no_device():
    code = (
        "import jax\n"
        "from jax._src import xla_bridge\n"
        "from seqeff.models import *\n"
        "TransformerConfig(vocabulary_size=8, width=8, layers=1,\n"
        "    projections=HeadProjections(heads=2), feed_forward=FeedForward(hidden=8))\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "jax.devices()\n"
        "assert xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_parameters_are_counted():
    gpt = TransformerConfig(
        vocabulary_size=50257,
        width=768,
        layers=12,
        projections=HeadProjections(heads=12),
        feed_forward=FeedForward(hidden=3072),
        positions=LearnedPositions(length=1024),
        tie_embeddings=True,
    )
    assert parameter_count(gpt) == 124_439_808
    assert matmul_parameters(gpt) == 12 * (4 * 768**2 + 2 * 768 * 3072) + 50257 * 768

    grouped = small_config(feed_forward=FeedForward(hidden=48, gated=True, bias=False))
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32
    matrices = 2 * (projections + 3 * 32 * 48)
    biases, norms = 2 * (32 + 16 + 16 + 32), (2 * 2 + 1) * 32
    assert parameter_count(grouped) == matrices + biases + norms + 2 * 97 * 32
    assert matmul_parameters(grouped) == matrices + 97 * 32

    low = dataclasses.replace(
        grouped, projections=HeadProjections(heads=4, kv_heads=2, query=(LowRankLinear(rank=5)))
    )
    assert matmul_parameters(low) == matrices - 2 * 32 * 32 + 2 * 5 * (32 + 32) + 97 * 32


def test_flops_are_counted():
    config = small_config()
    forward = 2 * matmul_parameters(config) + 2 * 2 * 10.5 * 32
    assert forward_flops_per_token(config, 10.5) == forward
    assert training_flops_per_token(config, 10.5) == 3 * forward


def initial(config):
    return quick_jit(lambda: nnx.to_pure_dict(nnx.split(config.make(nnx.Rngs(3)))[1]))()


def test_normal_initialisation():
    state = initial(small_config(**LARGE, initialisation=NormalInitialisation(std=0.05)))
    layers = state["layers"]
    for array in (
        state["embedding"],
        state["output_head"],
        layers["projections"]["query"]["kernel"],
        layers["projections"]["key"]["kernel"],
        layers["projections"]["value"]["kernel"],
        layers["feed_forward"]["up"]["kernel"],
        layers["feed_forward"]["gate"]["kernel"],
    ):
        assert np.std(array) == pytest.approx(0.05, rel=0.03)
    for array in (
        layers["projections"]["output"]["kernel"],
        layers["feed_forward"]["down"]["kernel"],
    ):
        assert np.std(array) == pytest.approx(0.05 / np.sqrt(2 * 4), rel=0.03)
    assert not np.any(layers["projections"]["query"]["bias"])
    np.testing.assert_array_equal(layers["attention_norm"]["scale"], 1)
    # no two matrices alike: neither of two layers nor of one
    kernels = layers["projections"]["query"]["kernel"]
    assert kernels.shape == (4, 128, 128)
    assert len({float(kernel[0, 0]) for kernel in kernels}) == 4
    assert not np.array_equal(kernels[0], layers["projections"]["output"]["kernel"][0])
    assert not np.array_equal(state["embedding"], state["output_head"])


def test_standard_deviations_of_the_families():
    small, plain = SmallInitialisation(), NormalInitialisation(std=0.02, scale_by_depth=False)
    assert small.input_std(768) == small.embedding_std(768) == pytest.approx((2 / 3840) ** 0.5)
    assert small.output_std(768, 12) == pytest.approx(2 / 12 / 768**0.5)
    assert plain.output_std(768, 12) == plain.input_std(768) == plain.embedding_std(768) == 0.02


def test_tied_embeddings_have_one_table():
    state = nnx.split(nnx.eval_shape(lambda: small_config(tie_embeddings=True).make(nnx.Rngs(0))))[
        1
    ]
    assert "output_head" not in nnx.to_pure_dict(state)
