"""GPT-2."""

from __future__ import annotations

from typing import Any

from seqeff.interop.family import ACTIVATION_NAMES, ACTIVATIONS, Family, read_dtype
from seqeff.interop.settings import Settings
from seqeff.interop.tensors import SAME, Tensor, concatenated, fused_linear, linear, norm
from seqeff.models import (
    FeedForward,
    HeadProjections,
    LayerNorm,
    LearnedPositions,
    TransformerConfig,
)


def _read(settings: Settings) -> TransformerConfig:
    settings.only(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    width = settings.size("n_embd")
    return TransformerConfig(
        vocabulary_size=settings.size("vocab_size"),
        width=width,
        layers=settings.size("n_layer"),
        projections=HeadProjections(heads=settings.size("n_head")),
        feed_forward=FeedForward(
            hidden=settings.get("n_inner", 4 * width),
            activation=settings.choice("activation_function", ACTIVATIONS, "gelu_new"),
        ),
        norm=LayerNorm(epsilon=settings.get("layer_norm_epsilon", 1e-5)),
        positions=LearnedPositions(length=settings.size("n_positions")),
        tie_embeddings=settings.get("tie_word_embeddings", True),
        dtype=read_dtype(settings),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.projections.heads,
        "n_inner": config.feed_forward.hidden,
        "activation_function": ACTIVATION_NAMES[config.feed_forward.activation],
        "layer_norm_epsilon": getattr(config.norm, "epsilon", None),
        "n_positions": config.positions.limit or 1,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _tensors(config: TransformerConfig) -> list[Tensor]:
    theirs = "transformer.h.{layer}"
    return [
        Tensor("transformer.wte.weight", ("embedding",)),
        Tensor("transformer.wpe.weight", ("position_embedding",)),
        *norm(f"{theirs}.ln_1", "layers.attention_norm"),
        *fused_linear(
            f"{theirs}.attn.c_attn",
            [f"layers.projections.{part}" for part in ("query", "key", "value")],
            concatenated(3),
        ),
        *linear(f"{theirs}.attn.c_proj", "layers.projections.output", SAME),
        *norm(f"{theirs}.ln_2", "layers.feed_forward_norm"),
        *linear(f"{theirs}.mlp.c_fc", "layers.feed_forward.up", SAME),
        *linear(f"{theirs}.mlp.c_proj", "layers.feed_forward.down", SAME),
        *norm("transformer.ln_f", "final_norm"),
        Tensor("lm_head.weight", ("output_head",)),
    ]


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    read=_read,
    write=_write,
    tensors=_tensors,
    activation="gelu_tanh",
    length="n_positions",
    prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)
