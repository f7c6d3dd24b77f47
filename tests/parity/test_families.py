"""Logits of the model with the weights of tiny random models of transformers."""

import families
import jax
import numpy as np
import pytest
from flax import nnx

from seqeff.models import (
    FeedForward,
    HeadProjections,
    LayerNorm,
    LearnedPositions,
    RMSNorm,
    Rotary,
    TransformerConfig,
)
from seqeff.models.flops import abstract_model

pytestmark = pytest.mark.parity

WIDTH, LAYERS, HEADS, HIDDEN, VOCABULARY, LENGTH = 32, 3, 4, 72, 101, 64
COMMON = {"vocabulary_size": VOCABULARY, "width": WIDTH, "layers": LAYERS, "dtype": "float32"}

FAMILIES = {
    "GPTNeoX": (
        families.gpt_neox,
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": HIDDEN,
            "max_position_embeddings": LENGTH,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        TransformerConfig(
            **COMMON,
            projections=HeadProjections(heads=HEADS),
            feed_forward=FeedForward(hidden=HIDDEN, activation="gelu"),
            positions=Rotary(fraction=0.25),
            residual="parallel",
        ),
    ),
    "OPT": (
        families.opt,
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": HIDDEN,
            "max_position_embeddings": LENGTH,
            "activation_function": "relu",
        },
        TransformerConfig(
            **COMMON,
            projections=HeadProjections(heads=HEADS),
            feed_forward=FeedForward(hidden=HIDDEN, activation="relu"),
            positions=LearnedPositions(length=LENGTH),
            tie_embeddings=True,
        ),
    ),
    "Llama": (
        families.llama,
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "intermediate_size": HIDDEN,
            "max_position_embeddings": LENGTH,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "tie_word_embeddings": False,
        },
        TransformerConfig(
            **COMMON,
            projections=HeadProjections(heads=HEADS, kv_heads=2, bias=False),
            feed_forward=FeedForward(hidden=HIDDEN, activation="silu", gated=True, bias=False),
            norm=RMSNorm(epsilon=1e-5),
            positions=Rotary(base=500_000.0),
        ),
    ),
    "GPT2": (
        families.gpt2,
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": HIDDEN,
            "n_positions": LENGTH,
            "activation_function": "gelu_new",
        },
        TransformerConfig(
            **COMMON,
            projections=HeadProjections(heads=HEADS),
            feed_forward=FeedForward(hidden=HIDDEN, activation="gelu_tanh"),
            norm=LayerNorm(epsilon=1e-5),
            positions=LearnedPositions(length=LENGTH),
            tie_embeddings=True,
        ),
    ),
    "GPTJ": (
        families.gptj,
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": HIDDEN,
            "n_positions": LENGTH,
            "rotary_dim": 4,
            "activation_function": "gelu_new",
            "tie_word_embeddings": False,
        },
        TransformerConfig(
            **COMMON,
            projections=HeadProjections(heads=HEADS, bias=False),
            feed_forward=FeedForward(hidden=HIDDEN, activation="gelu_tanh"),
            positions=Rotary(fraction=0.5, pairs="interleaved"),
            residual="parallel",
        ),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_theirs(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    convert, settings, config = FAMILIES[family]
    theirs_config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **settings)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    theirs = getattr(transformers, family + head)(theirs_config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        # as initialised, biases are 0, norms 1 and all else so small that mistakes would hide
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and "bias" not in name else 0.0, 0.2)
            if name == "lm_head.bias":
                parameter.zero_()

    weights = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    parameters = convert(weights, LAYERS, HEADS)
    graph, state = nnx.split(abstract_model(config))
    shapes = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(lambda leaf: leaf.shape, parameters) == {
        name: shape for name, shape in shapes.items() if shape is not None
    }

    @jax.jit
    def logits(parameters, tokens):
        model = nnx.merge(graph, parameters)
        return model.logits(model(tokens))

    for batch, length in ((1, 1), (3, 7), (2, 63)):
        tokens = np.random.default_rng(length).integers(0, VOCABULARY, (batch, length))
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        assert np.std(expected) > 0.5
        np.testing.assert_allclose(logits(parameters, tokens), expected, atol=1e-4, rtol=1e-4)
