"""GPT-NeoX and Pythia."""

from __future__ import annotations

from typing import Any

from seqeff.interop.family import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Family,
    read_dtype,
    read_rotary,
    write_scaling,
)
from seqeff.interop.settings import Settings
from seqeff.interop.tensors import Tensor, fused_linear, linear, norm, transposed_by_head
from seqeff.models import FeedForward, HeadProjections, LayerNorm, TransformerConfig


def _read(settings: Settings) -> TransformerConfig:
    return TransformerConfig(
        vocabulary_size=settings.size("vocab_size"),
        width=settings.size("hidden_size"),
        layers=settings.size("num_hidden_layers"),
        projections=HeadProjections(
            heads=settings.size("num_attention_heads"),
            bias=settings.get("attention_bias", True),
        ),
        feed_forward=FeedForward(
            hidden=settings.size("intermediate_size"),
            activation=settings.choice("hidden_act", ACTIVATIONS, "gelu"),
        ),
        norm=LayerNorm(epsilon=settings.get("layer_norm_eps", 1e-5)),
        positions=read_rotary(settings, "rotary_emb_base", "rotary_pct", 0.25),
        residual="parallel" if settings.get("use_parallel_residual", True) else "sequential",
        tie_embeddings=settings.get("tie_word_embeddings", False),
        dtype=read_dtype(settings),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    positions = config.positions
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.projections.heads,
        "attention_bias": config.projections.bias,
        "intermediate_size": config.feed_forward.hidden,
        "hidden_act": ACTIVATION_NAMES[config.feed_forward.activation],
        "layer_norm_eps": getattr(config.norm, "epsilon", None),
        "rotary_emb_base": getattr(positions, "base", None),
        "rotary_pct": getattr(positions, "fraction", None),
        "rope_scaling": write_scaling(positions),
        "use_parallel_residual": config.residual == "parallel",
        "tie_word_embeddings": config.tie_embeddings,
    }


def _tensors(config: TransformerConfig) -> list[Tensor]:
    theirs, fused = "gpt_neox.layers.{layer}", transposed_by_head(config.projections.heads, 3)
    return [
        Tensor("gpt_neox.embed_in.weight", ("embedding",)),
        *norm(f"{theirs}.input_layernorm", "layers.attention_norm"),
        *fused_linear(
            f"{theirs}.attention.query_key_value",
            [f"layers.projections.{part}" for part in ("query", "key", "value")],
            fused,
        ),
        *linear(f"{theirs}.attention.dense", "layers.projections.output"),
        *norm(f"{theirs}.post_attention_layernorm", "layers.feed_forward_norm"),
        *linear(f"{theirs}.mlp.dense_h_to_4h", "layers.feed_forward.up"),
        *linear(f"{theirs}.mlp.dense_4h_to_h", "layers.feed_forward.down"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        Tensor("embed_out.weight", ("output_head",), aliases=("lm_head.weight",)),
    ]


GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    read=_read,
    write=_write,
    tensors=_tensors,
    activation="gelu",
    prefix="gpt_neox.",
    ignored=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
