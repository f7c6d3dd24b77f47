"""A small model of every variant that can be exported."""

import dataclasses

from hugging_face import LENGTH, VOCABULARY

from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LowRankLinear,
    RMSNorm,
    Rotary,
    SeparatorAttention,
    TransformerConfig,
    YarnScaling,
)

SIZES = {"vocabulary_size": VOCABULARY, "width": 24, "layers": 3, "dtype": "float32"}


def gpt_neox(**changes):
    values = {
        "projections": HeadProjections(heads=3),
        "feed_forward": FeedForward(hidden=20),
        "positions": Rotary(fraction=0.25),
        "residual": "parallel",
    }
    return TransformerConfig(**SIZES, **(values | changes))


def llama(bias=False, output_bias=None, **changes):
    heads = {key: changes.pop(key) for key in ("head_dim", "head_norm") if key in changes}
    values = {
        "projections": HeadProjections(
            heads=4, kv_heads=2, bias=bias, output_bias=output_bias, **heads
        ),
        "feed_forward": FeedForward(hidden=20, activation="silu", gated=True, bias=False),
        "norm": RMSNorm(epsilon=1e-5),
        "positions": Rotary(base=500.0),
    }
    return TransformerConfig(**SIZES, **(values | changes))


def learned(activation, **changes):
    values = {
        "projections": HeadProjections(heads=3),
        "feed_forward": FeedForward(hidden=20, activation=activation),
        "positions": LearnedPositions(length=LENGTH),
        "tie_embeddings": True,
    }
    return TransformerConfig(**SIZES, **(values | changes))


WINDOWS = {1: DenseAttention(window=5), -1: DenseAttention(window=5)}

PLAIN = {
    "gpt-neox": ("GPTNeoXForCausalLM", gpt_neox()),
    "gpt-neox, sequential": (
        "GPTNeoXForCausalLM",
        gpt_neox(
            residual="sequential",
            tie_embeddings=True,
            positions=Rotary(base=99.0, scaling=LinearScaling(factor=3.0)),
            projections=HeadProjections(heads=3, bias=False),
        ),
    ),
    "llama": ("LlamaForCausalLM", llama()),
    "llama, tied, scaled": (
        "LlamaForCausalLM",
        llama(
            tie_embeddings=True,
            positions=Rotary(
                scaling=Llama3Scaling(
                    factor=8.0,
                    low_frequency_factor=1.0,
                    high_frequency_factor=4.0,
                    original_length=16,
                )
            ),
        ),
    ),
    "llama, yarn": (
        "LlamaForCausalLM",
        llama(positions=Rotary(scaling=YarnScaling(factor=4.0, original_length=16, fast=9.0))),
    ),
    "llama, biases": (
        "LlamaForCausalLM",
        llama(
            bias=True,
            head_dim=10,
            feed_forward=FeedForward(hidden=20, activation="gelu_tanh", gated=True),
        ),
    ),
    "mistral": ("MistralForCausalLM", llama(attention=DenseAttention(window=7))),
    "qwen 2": ("Qwen2ForCausalLM", llama(bias=True, output_bias=False)),
    "qwen 2, windows": (
        "Qwen2ForCausalLM",
        llama(bias=True, output_bias=False, layer_attention=WINDOWS),
    ),
    "qwen 3": ("Qwen3ForCausalLM", llama(head_dim=8, head_norm=RMSNorm(epsilon=1e-5))),
    "qwen 3, windows": (
        "Qwen3ForCausalLM",
        llama(bias=True, head_norm=RMSNorm(epsilon=1e-5), layer_attention=WINDOWS),
    ),
    "gpt-2": ("GPT2LMHeadModel", learned("gelu_tanh")),
    "gpt-2, untied": (
        "GPT2LMHeadModel",
        learned("relu", norm=LayerNorm(epsilon=1e-3), tie_embeddings=False),
    ),
    "opt": ("OPTForCausalLM", learned("relu")),
    "opt, no biases": (
        "OPTForCausalLM",
        learned(
            "gelu",
            projections=HeadProjections(heads=3, bias=False),
            feed_forward=FeedForward(hidden=20, bias=False),
        ),
    ),
}


def separators(**changes):
    values = {"window": 5, "separator_ids": tuple(range(7, 61))}
    return SeparatorAttention(**(values | changes))


BOUNDED = separators(separators=2)
STREAMING = separators(separator_ids=(), initial_tokens=4)
COMPACT = separators(separators=2, positions="compact")
COMPACT_STREAMING = separators(separator_ids=(), initial_tokens=4, positions="compact")

MASKED = {
    "gpt-neox, separators": (
        "SeparatorGPTNeoXForCausalLM",
        gpt_neox(attention=separators(initial_of="row")),
    ),
    "gpt-neox, bounded, full layers": (
        "SeparatorGPTNeoXForCausalLM",
        gpt_neox(attention=BOUNDED, layer_attention={-1: DenseAttention()}),
    ),
    "llama, all kinds": (
        "SeparatorLlamaForCausalLM",
        llama(attention=BOUNDED, layer_attention={0: DenseAttention(window=9), -2: STREAMING}),
    ),
    "llama, windows of layers": (
        "SeparatorLlamaForCausalLM",
        llama(layer_attention={0: DenseAttention(window=3), 1: DenseAttention(window=4)}),
    ),
    "qwen 2, every fourth": (
        "SeparatorQwen2ForCausalLM",
        llama(bias=True, output_bias=False, attention=separators(separator_ids=(), interval=4)),
    ),
    "qwen 3, bounded every fourth": (
        "SeparatorQwen3ForCausalLM",
        llama(
            head_norm=RMSNorm(epsilon=1e-5),
            attention=separators(separators=3, interval=4, initial_tokens=0),
        ),
    ),
    "gpt-neox, compact": (
        "SeparatorGPTNeoXForCausalLM",
        gpt_neox(
            attention=COMPACT,
            layer_attention={-1: DenseAttention()},
            positions=Rotary(fraction=0.75),
        ),
    ),
    "llama, compact, scaled": (
        "SeparatorLlamaForCausalLM",
        llama(
            attention=separators(positions="compact"),
            layer_attention={0: COMPACT_STREAMING, 1: COMPACT},
            positions=Rotary(scaling=YarnScaling(factor=4.0, original_length=16, fast=9.0)),
        ),
    ),
    "gpt-2, streaming": ("SeparatorGPT2LMHeadModel", learned("gelu_tanh", attention=STREAMING)),
    "opt, bounded": ("SeparatorOPTForCausalLM", learned("relu", attention=BOUNDED)),
}
"""Those that come with a modelling file."""

VARIANTS = PLAIN | MASKED


def low_rank(model):
    """The model with every projection factored, each through a rank of its own."""
    ranks = {
        "projections": {"query": 2, "key": 3, "value": 4, "output": 5},
        "feed_forward": {"up": 6, "gate": 7, "down": 8},
    }
    parts = {
        part: dataclasses.replace(
            getattr(model, part), **{name: LowRankLinear(rank=rank) for name, rank in own.items()}
        )
        for part, own in ranks.items()
    }
    return dataclasses.replace(model, **parts)


LOW_RANK = {
    "gpt-neox, low rank": ("GPTNeoXForCausalLM", low_rank(gpt_neox())),
    "llama, low rank": ("LlamaForCausalLM", low_rank(llama(bias=True))),
    "llama, low rank, separators": (
        "SeparatorLlamaForCausalLM",
        low_rank(llama(attention=BOUNDED, layer_attention={0: DenseAttention(window=9)})),
    ),
}
"""Those that are dense ones once they are exported."""
