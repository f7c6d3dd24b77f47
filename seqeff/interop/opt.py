"""OPT, without the projections and the post-norm of OPT-350m."""

from __future__ import annotations

from typing import Any

from seqeff.interop.family import ACTIVATION_NAMES, ACTIVATIONS, Family, read_dtype
from seqeff.interop.settings import Settings
from seqeff.interop.tensors import Tensor, after_unused_rows, linear, norm
from seqeff.models import (
    FeedForward,
    HeadProjections,
    LayerNorm,
    LearnedPositions,
    TransformerConfig,
)

_UNUSED_POSITIONS = 2


def _read(settings: Settings) -> TransformerConfig:
    width = settings.size("hidden_size")
    settings.only(
        word_embed_proj_dim=width,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
    )
    bias = settings.get("enable_bias", True)
    return TransformerConfig(
        vocabulary_size=settings.size("vocab_size"),
        width=width,
        layers=settings.size("num_hidden_layers"),
        projections=HeadProjections(heads=settings.size("num_attention_heads"), bias=bias),
        feed_forward=FeedForward(
            hidden=settings.size("ffn_dim"),
            activation=settings.choice("activation_function", ACTIVATIONS, "relu"),
            bias=bias,
        ),
        norm=LayerNorm(epsilon=1e-5),
        positions=LearnedPositions(length=settings.size("max_position_embeddings")),
        tie_embeddings=settings.get("tie_word_embeddings", True),
        dtype=read_dtype(settings),
    )


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.projections.heads,
        "enable_bias": config.projections.bias,
        "ffn_dim": config.feed_forward.hidden,
        "activation_function": ACTIVATION_NAMES[config.feed_forward.activation],
        "do_layer_norm_before": True,
        "max_position_embeddings": config.positions.limit or 1,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _tensors(config: TransformerConfig) -> list[Tensor]:
    theirs = "model.decoder.layers.{layer}"
    return [
        Tensor("model.decoder.embed_tokens.weight", ("embedding",)),
        Tensor(
            "model.decoder.embed_positions.weight",
            ("position_embedding",),
            after_unused_rows(_UNUSED_POSITIONS),
        ),
        *norm(f"{theirs}.self_attn_layer_norm", "layers.attention_norm"),
        *linear(f"{theirs}.self_attn.q_proj", "layers.projections.query"),
        *linear(f"{theirs}.self_attn.k_proj", "layers.projections.key"),
        *linear(f"{theirs}.self_attn.v_proj", "layers.projections.value"),
        *linear(f"{theirs}.self_attn.out_proj", "layers.projections.output"),
        *norm(f"{theirs}.final_layer_norm", "layers.feed_forward_norm"),
        *linear(f"{theirs}.fc1", "layers.feed_forward.up"),
        *linear(f"{theirs}.fc2", "layers.feed_forward.down"),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        Tensor("lm_head.weight", ("output_head",)),
    ]


OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    read=_read,
    write=_write,
    tensors=_tensors,
    activation="relu",
    prefix="model.",
)
