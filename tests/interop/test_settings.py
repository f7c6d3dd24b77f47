"""Settings as published models have them, by older and newer versions of transformers."""

import pytest
from variants import VARIANTS

from seqeff.checks import UserError
from seqeff.interop.gpt2 import GPT2
from seqeff.interop.gpt_neox import GPT_NEOX
from seqeff.interop.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from seqeff.interop.opt import OPT
from seqeff.interop.settings import Settings
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    LayerNorm,
    LearnedPositions,
    Llama3Scaling,
    RMSNorm,
    Rotary,
    TransformerConfig,
)


def llama(kv_heads, head_dim=128, bias=False, head_norm=None, **values):
    return TransformerConfig(
        projections=HeadProjections(
            heads=32,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            output_bias=False,
            head_norm=head_norm,
        ),
        **({"residual": "sequential", "dtype": "bfloat16"} | values),
    )


def gated(hidden):
    return FeedForward(hidden=hidden, activation="silu", gated=True, bias=False)


MODELS = {
    "pythia": (
        GPT_NEOX,
        {
            "hidden_act": "gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-05,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        TransformerConfig(
            vocabulary_size=50304,
            width=768,
            layers=12,
            projections=HeadProjections(heads=12),
            feed_forward=FeedForward(hidden=3072),
            positions=Rotary(fraction=0.25),
            residual="parallel",
        ),
    ),
    "llama 3.1": (
        LLAMA,
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
        llama(
            8,
            vocabulary_size=128256,
            width=4096,
            layers=32,
            feed_forward=gated(14336),
            norm=RMSNorm(epsilon=1e-5),
            positions=Rotary(
                base=500_000.0,
                scaling=Llama3Scaling(
                    factor=8.0,
                    low_frequency_factor=1.0,
                    high_frequency_factor=4.0,
                    original_length=8192,
                ),
            ),
        ),
    ),
    "llama of early settings": (
        LLAMA,
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-06,
            "vocab_size": 32000,
        },
        llama(
            32,
            vocabulary_size=32000,
            width=4096,
            layers=2,
            feed_forward=gated(11008),
            norm=RMSNorm(),
            dtype="float32",
        ),
    ),
    "mistral": (
        MISTRAL,
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
        llama(
            8,
            vocabulary_size=32000,
            width=4096,
            layers=2,
            feed_forward=gated(14336),
            norm=RMSNorm(epsilon=1e-5),
            attention=DenseAttention(window=4096),
        ),
    ),
    "qwen 2": (
        QWEN2,
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_window_layers": 21,
            "num_attention_heads": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        llama(
            2,
            bias=True,
            vocabulary_size=151936,
            width=4096,
            layers=2,
            feed_forward=gated(11008),
            norm=RMSNorm(),
            positions=Rotary(base=1e6),
            tie_embeddings=True,
        ),
    ),
    "qwen 3": (
        QWEN3,
        {
            "attention_bias": False,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            "sliding_window": None,
            "vocab_size": 151936,
        },
        llama(
            8,
            head_norm=RMSNorm(),
            vocabulary_size=151936,
            width=2560,
            layers=2,
            feed_forward=gated(9728),
            norm=RMSNorm(),
            positions=Rotary(base=1e6),
        ),
    ),
    "gpt-2": (
        GPT2,
        {
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-05,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        TransformerConfig(
            vocabulary_size=50257,
            width=768,
            layers=12,
            projections=HeadProjections(heads=12),
            feed_forward=FeedForward(hidden=3072, activation="gelu_tanh"),
            norm=LayerNorm(),
            positions=LearnedPositions(length=1024),
            tie_embeddings=True,
            dtype="float32",
        ),
    ),
    "opt": (
        OPT,
        {
            "_remove_final_layer_norm": False,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "ffn_dim": 3072,
            "hidden_size": 768,
            "max_position_embeddings": 2048,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "torch_dtype": "float16",
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
        },
        TransformerConfig(
            vocabulary_size=50272,
            width=768,
            layers=12,
            projections=HeadProjections(heads=12),
            feed_forward=FeedForward(hidden=3072, activation="relu"),
            norm=LayerNorm(),
            positions=LearnedPositions(length=2048),
            tie_embeddings=True,
        ),
    ),
}


SMALL = {
    family.architecture: (family, family.write(VARIANTS[name][1]))
    for name, family in (
        ("gpt-neox, sequential", GPT_NEOX),
        ("llama, yarn", LLAMA),
        ("mistral", MISTRAL),
        ("qwen 2, windows", QWEN2),
        ("qwen 3", QWEN3),
        ("gpt-2", GPT2),
        ("opt", OPT),
    )
}


@pytest.mark.parametrize("architecture", SMALL)
def test_a_strange_value_is_refused_or_makes_a_model(architecture):
    family, settings = SMALL[architecture]
    made, refused = 0, 0
    for name in settings:
        for value in (0, -1, 7, 1.5, True, "x", [], [1], {"x": 1}, {"rope_type": "yarn"}):
            try:
                family.read(Settings(settings | {name: value}, "config.json"))
                made += 1
            except UserError as error:
                assert len(str(error).splitlines()) == 1
                refused += 1
    assert refused > 5 * len(settings)
    assert made > len(settings) / 2


@pytest.mark.parametrize("model", MODELS)
def test_settings_of_published_models(model):
    family, settings, expected = MODELS[model]
    assert family.read(Settings(settings, "config.json")) == expected
