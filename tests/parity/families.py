"""Weights of transformers' families as our parameters; all arrays are numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Weights = Mapping[str, np.ndarray]


def linear(weights: Weights, name: str) -> dict[str, np.ndarray]:
    """torch keeps [outputs, inputs]."""
    layer = {"kernel": weights[f"{name}.weight"].T}
    if f"{name}.bias" in weights:
        layer["bias"] = weights[f"{name}.bias"]
    return layer


def norm(weights: Weights, name: str) -> dict[str, np.ndarray]:
    layer = {"scale": weights[f"{name}.weight"]}
    if f"{name}.bias" in weights:
        layer["bias"] = weights[f"{name}.bias"]
    return layer


def stacked(layers: int, make: Callable[[int], Any]) -> Any:
    return jax.tree.map(lambda *each: np.stack(each), *(make(layer) for layer in range(layers)))


def gpt_neox(weights: Weights, layers: int, heads: int) -> dict[str, Any]:
    def layer(index: int) -> dict[str, Any]:
        name = f"gpt_neox.layers.{index}"
        fused = linear(weights, f"{name}.attention.query_key_value")

        def part(which: int) -> dict[str, np.ndarray]:
            # outputs are [heads, (query, key, value), head_dim]
            return {
                key: array.reshape(*array.shape[:-1], heads, 3, -1)[..., which, :].reshape(
                    *array.shape[:-1], -1
                )
                for key, array in fused.items()
            }

        return {
            "attention_norm": norm(weights, f"{name}.input_layernorm"),
            "projections": {
                "query": part(0),
                "key": part(1),
                "value": part(2),
                "output": linear(weights, f"{name}.attention.dense"),
            },
            "feed_forward_norm": norm(weights, f"{name}.post_attention_layernorm"),
            "feed_forward": {
                "up": linear(weights, f"{name}.mlp.dense_h_to_4h"),
                "down": linear(weights, f"{name}.mlp.dense_4h_to_h"),
            },
        }

    # its name depends on the version of transformers
    head = "embed_out.weight" if "embed_out.weight" in weights else "lm_head.weight"
    return {
        "embedding": weights["gpt_neox.embed_in.weight"],
        "layers": stacked(layers, layer),
        "final_norm": norm(weights, "gpt_neox.final_layer_norm"),
        "output_head": weights[head],
    }


def opt(weights: Weights, layers: int, heads: int) -> dict[str, Any]:
    del heads

    def layer(index: int) -> dict[str, Any]:
        name = f"model.decoder.layers.{index}"
        return {
            "attention_norm": norm(weights, f"{name}.self_attn_layer_norm"),
            "projections": {
                ours: linear(weights, f"{name}.self_attn.{theirs}_proj")
                for ours, theirs in zip(
                    ("query", "key", "value", "output"), ("q", "k", "v", "out"), strict=True
                )
            },
            "feed_forward_norm": norm(weights, f"{name}.final_layer_norm"),
            "feed_forward": {
                "up": linear(weights, f"{name}.fc1"),
                "down": linear(weights, f"{name}.fc2"),
            },
        }

    return {
        "embedding": weights["model.decoder.embed_tokens.weight"],
        # OPT's first position is row 2
        "position_embedding": weights["model.decoder.embed_positions.weight"][2:],
        "layers": stacked(layers, layer),
        "final_norm": norm(weights, "model.decoder.final_layer_norm"),
    }


def llama(weights: Weights, layers: int, heads: int) -> dict[str, Any]:
    del heads

    def layer(index: int) -> dict[str, Any]:
        name = f"model.layers.{index}"
        return {
            "attention_norm": norm(weights, f"{name}.input_layernorm"),
            "projections": {
                ours: linear(weights, f"{name}.self_attn.{ours[0]}_proj")
                for ours in ("query", "key", "value", "output")
            },
            "feed_forward_norm": norm(weights, f"{name}.post_attention_layernorm"),
            "feed_forward": {
                ours: linear(weights, f"{name}.mlp.{ours}_proj") for ours in ("up", "gate", "down")
            },
        }

    return {
        "embedding": weights["model.embed_tokens.weight"],
        "layers": stacked(layers, layer),
        "final_norm": norm(weights, "model.norm"),
        "output_head": weights["lm_head.weight"],
    }


def gpt2(weights: Weights, layers: int, heads: int) -> dict[str, Any]:
    del heads

    def convolution(name: str) -> dict[str, np.ndarray]:
        return {"kernel": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def layer(index: int) -> dict[str, Any]:
        name = f"transformer.h.{index}"
        fused = convolution(f"{name}.attn.c_attn")
        thirds = {key: np.split(array, 3, axis=-1) for key, array in fused.items()}
        return {
            "attention_norm": norm(weights, f"{name}.ln_1"),
            "projections": {
                "query": {key: parts[0] for key, parts in thirds.items()},
                "key": {key: parts[1] for key, parts in thirds.items()},
                "value": {key: parts[2] for key, parts in thirds.items()},
                "output": convolution(f"{name}.attn.c_proj"),
            },
            "feed_forward_norm": norm(weights, f"{name}.ln_2"),
            "feed_forward": {
                "up": convolution(f"{name}.mlp.c_fc"),
                "down": convolution(f"{name}.mlp.c_proj"),
            },
        }

    return {
        "embedding": weights["transformer.wte.weight"],
        "position_embedding": weights["transformer.wpe.weight"],
        "layers": stacked(layers, layer),
        "final_norm": norm(weights, "transformer.ln_f"),
    }


def gptj(weights: Weights, layers: int, heads: int) -> dict[str, Any]:
    """Attention and feed-forward share a norm, which is copied; the head's bias must be zero."""
    del heads
    assert not np.any(weights["lm_head.bias"])

    def layer(index: int) -> dict[str, Any]:
        name = f"transformer.h.{index}"
        return {
            "attention_norm": norm(weights, f"{name}.ln_1"),
            "projections": {
                ours: linear(weights, f"{name}.attn.{theirs}_proj")
                for ours, theirs in zip(
                    ("query", "key", "value", "output"), ("q", "k", "v", "out"), strict=True
                )
            },
            "feed_forward_norm": norm(weights, f"{name}.ln_1"),
            "feed_forward": {
                "up": linear(weights, f"{name}.mlp.fc_in"),
                "down": linear(weights, f"{name}.mlp.fc_out"),
            },
        }

    return {
        "embedding": weights["transformer.wte.weight"],
        "layers": stacked(layers, layer),
        "final_norm": norm(weights, "transformer.ln_f"),
        "output_head": weights["lm_head.weight"],
    }
