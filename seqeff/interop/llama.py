"""Llama, and Mistral, Qwen2 and Qwen3, which differ from it in biases, norms and windows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from seqeff.checks import require
from seqeff.interop.family import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Family,
    one_window,
    read_dtype,
    read_rotary,
    window_of,
    write_scaling,
)
from seqeff.interop.settings import Settings
from seqeff.interop.tensors import Tensor, linear, norm
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    RMSNorm,
    TransformerConfig,
)

Windows = tuple[int | None, ...]


class _Kind(NamedTuple):
    """Where the families differ.

    Attributes:
      biases: of query, key and value; of the output; of the feed-forward. A string is the setting
        that says.
      kv_heads: where the settings do not say; None: as many as there are heads.
      head_dim: the same; None: width / heads, which must be whole.
      head_norm: whether each head of queries and keys is normalised.
      read_windows: from the settings and the number of layers.
      write_windows: settings of a model's windows.
    """

    biases: tuple[bool | str, bool | str, bool | str]
    kv_heads: int | None
    head_dim: int | None
    head_norm: bool
    read_windows: Callable[[Settings, int], Windows]
    write_windows: Callable[[TransformerConfig], dict[str, Any]]


def _no_windows(settings: Settings, layers: int) -> Windows:
    return (None,) * layers


def _same_windows(settings: Settings, layers: int) -> Windows:
    return (settings.optional("sliding_window", int, 4096),) * layers


def _write_same_windows(config: TransformerConfig) -> dict[str, Any]:
    return {"sliding_window": one_window(config)}


_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def _later_windows(settings: Settings, layers: int) -> Windows:
    """Windows of the later layers, or of those that `layer_types` names."""
    window = settings.optional("sliding_window", int, 4096)
    if window is None or not settings.get("use_sliding_window", False):
        return (None,) * layers
    types = settings.values.get("layer_types")
    if types is None:
        first = settings.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    require(
        isinstance(types, list)
        and len(types) == layers
        and all(isinstance(name, str) and name in _LAYER_TYPES for name in types),
        f"layer_types = {types!r} must name for each of the {layers} layers one of "
        f"{', '.join(_LAYER_TYPES)}",
    )
    return tuple(window if _LAYER_TYPES[name] else None for name in types)


def _write_later_windows(config: TransformerConfig) -> dict[str, Any]:
    windows, window = list(map(window_of, config.attentions())), one_window(config)
    if window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": next(i for i, other in enumerate(windows) if other == window),
        "layer_types": [
            "full_attention" if other is None else "sliding_attention" for other in windows
        ],
    }


def _read(kind: _Kind, settings: Settings) -> TransformerConfig:
    width = settings.size("hidden_size")
    heads = settings.size("num_attention_heads")
    layers = settings.size("num_hidden_layers")
    require(
        kind.head_dim is not None or width % heads == 0,
        f"num_attention_heads = {heads} must divide hidden_size = {width}",
    )
    epsilon = settings.get("rms_norm_eps", 1e-6)
    projections, output, feed_forward = (
        settings.get(bias, False) if isinstance(bias, str) else bias for bias in kind.biases
    )
    positions = read_rotary(settings)
    require(
        positions.fraction == 1,
        f"partial_rotary_factor = {positions.fraction} is not supported; only 1.0 is",
    )
    windows = kind.read_windows(settings, layers)
    differ = len(set(windows)) > 1
    return TransformerConfig(
        vocabulary_size=settings.size("vocab_size"),
        width=width,
        layers=layers,
        projections=HeadProjections(
            heads=heads,
            kv_heads=settings.get("num_key_value_heads", kind.kv_heads or heads),
            head_dim=settings.get("head_dim", kind.head_dim or width // heads),
            bias=projections,
            output_bias=output,
            head_norm=RMSNorm(epsilon=epsilon) if kind.head_norm else None,
        ),
        feed_forward=FeedForward(
            hidden=settings.size("intermediate_size"),
            activation=settings.choice("hidden_act", ACTIVATIONS, "silu"),
            gated=True,
            bias=feed_forward,
        ),
        attention=DenseAttention(window=None if differ else windows[0]),
        layer_attention={
            layer: DenseAttention(window=window)
            for layer, window in enumerate(windows)
            if differ and window is not None
        },
        norm=RMSNorm(epsilon=epsilon),
        positions=positions,
        tie_embeddings=settings.get("tie_word_embeddings", False),
        dtype=read_dtype(settings),
    )


def _write(kind: _Kind, config: TransformerConfig) -> dict[str, Any]:
    heads, positions = config.projections, config.positions
    output = heads.bias if heads.output_bias is None else heads.output_bias
    biases = zip(kind.biases, (heads.bias, output, config.feed_forward.bias), strict=True)
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads.heads,
        "num_key_value_heads": heads.groups(),
        "head_dim": heads.size(config.width),
        "intermediate_size": config.feed_forward.hidden,
        "hidden_act": ACTIVATION_NAMES[config.feed_forward.activation],
        "rms_norm_eps": getattr(config.norm, "epsilon", None),
        "rope_theta": getattr(positions, "base", None),
        "rope_scaling": write_scaling(positions),
        "tie_word_embeddings": config.tie_embeddings,
        **{name: bias for name, bias in biases if isinstance(name, str)},
        **kind.write_windows(config),
    }


def _tensors(config: TransformerConfig) -> list[Tensor]:
    theirs = "model.layers.{layer}"
    return [
        Tensor("model.embed_tokens.weight", ("embedding",)),
        *norm(f"{theirs}.input_layernorm", "layers.attention_norm"),
        *linear(f"{theirs}.self_attn.q_proj", "layers.projections.query"),
        *linear(f"{theirs}.self_attn.k_proj", "layers.projections.key"),
        *linear(f"{theirs}.self_attn.v_proj", "layers.projections.value"),
        *linear(f"{theirs}.self_attn.o_proj", "layers.projections.output"),
        *norm(f"{theirs}.self_attn.q_norm", "layers.projections.query_norm"),
        *norm(f"{theirs}.self_attn.k_norm", "layers.projections.key_norm"),
        *norm(f"{theirs}.post_attention_layernorm", "layers.feed_forward_norm"),
        *linear(f"{theirs}.mlp.gate_proj", "layers.feed_forward.gate"),
        *linear(f"{theirs}.mlp.up_proj", "layers.feed_forward.up"),
        *linear(f"{theirs}.mlp.down_proj", "layers.feed_forward.down"),
        *norm("model.norm", "final_norm"),
        Tensor("lm_head.weight", ("output_head",)),
    ]


def _family(architecture: str, model_type: str, kind: _Kind) -> Family:
    return Family(
        architecture=architecture,
        model_type=model_type,
        read=functools.partial(_read, kind),
        write=functools.partial(_write, kind),
        tensors=_tensors,
        activation="silu",
        prefix="model.",
        ignored=r".*\.rotary_emb\.inv_freq",
    )


LLAMA = _family(
    "LlamaForCausalLM",
    "llama",
    _Kind(
        biases=("attention_bias", "attention_bias", "mlp_bias"),
        kv_heads=None,
        head_dim=None,
        head_norm=False,
        read_windows=_no_windows,
        write_windows=lambda config: {},
    ),
)
MISTRAL = _family(
    "MistralForCausalLM",
    "mistral",
    _Kind(
        biases=(False, False, False),
        kv_heads=8,
        head_dim=None,
        head_norm=False,
        read_windows=_same_windows,
        write_windows=_write_same_windows,
    ),
)
QWEN2 = _family(
    "Qwen2ForCausalLM",
    "qwen2",
    _Kind(
        biases=(True, False, False),
        kv_heads=32,
        head_dim=None,
        head_norm=False,
        read_windows=_later_windows,
        write_windows=_write_later_windows,
    ),
)
QWEN3 = _family(
    "Qwen3ForCausalLM",
    "qwen3",
    _Kind(
        biases=("attention_bias", "attention_bias", False),
        kv_heads=32,
        head_dim=128,
        head_norm=True,
        read_windows=_later_windows,
        write_windows=_write_later_windows,
    ),
)
