"""Layers whose products with the same input are one product, for decoding.

A step that takes few tokens is bound by how many products follow each other, not by their sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqeff.models.heads import Heads, Joined
from seqeff.models.linear import DenseLayer, DenseLinear
from seqeff.models.norms import LayerNorm, RMSNorm
from seqeff.models.positions import Rotation
from seqeff.models.transformer import TransformerConfig, rotated


def joins(config: TransformerConfig) -> bool:
    """Whether a `JoinedLayer` can do what the model's layers do.

    Attention and feed-forward must have the same input, dense matrices, and norms that can be
    multiplied into these.
    """
    heads, feed_forward = config.projections, config.feed_forward
    matrices = (heads.query, heads.key, heads.value, heads.output)
    matrices += (feed_forward.up, feed_forward.gate, feed_forward.down)
    return (
        config.residual == "parallel"
        and heads.head_norm is None
        and isinstance(config.norm, LayerNorm | RMSNorm)
        and all(isinstance(matrix, DenseLinear) for matrix in matrices)
    )


class JoinedLayer(nnx.Module):
    """A parallel `Layer` with one matrix into it, and one out of it."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        self.config, self.parts = config, _parts(config)
        heads, hidden = self.parts["query"], self.parts["up"]
        whole = PartitionSpec(None, None)
        into, out = sum(self.parts.values()), heads + hidden
        self.into = DenseLayer(config.width, into, True, 0.0, whole, rngs)
        self.out = DenseLayer(out, config.width, True, 0.0, whole, rngs)

    def __call__(
        self,
        x: Float[Array, "batch rows width"],
        attend: Callable[[Heads], Float[Array, "batch rows heads head_dim"]],
        rotation: Rotation | None,
    ) -> Float[Array, "batch rows width"]:
        """See `Layer`."""
        config = self.config
        assert isinstance(config.norm, LayerNorm | RMSNorm)
        product = self.into.product(config.norm.standardise(x).astype(x.dtype))
        assert self.into.bias is not None
        bias = self.into.bias[...].astype(x.dtype)
        ends = list(itertools.accumulate(self.parts.values()))[:-1]
        found = dict(zip(self.parts, jnp.split(product + bias, ends, axis=-1), strict=True))
        queries, keys, values = (
            found[name].reshape(*x.shape[:-1], -1, config.projections.size(config.width))
            for name in ("query", "key", "value")
        )
        turns = None if rotation is None else (rotation.cosine[:, :, 0], rotation.sine[:, :, 0])
        heads = rotated(config, queries, keys, values, rotation)
        attended = attend(
            heads._replace(joined=Joined(product, bias, turns, config.positions.interleaved))
        )
        hidden = config.feed_forward.activate(found["up"], found.get("gate"))
        attended = attended.reshape(*x.shape[:-1], -1)
        return x + self.out(jnp.concatenate([attended, hidden], axis=-1))


def joined_parameters(config: TransformerConfig, layer: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a `JoinedLayer` from those of the `Layer`, as pure dicts.

    In the activations' type, all: a conversion would be a kernel of its own in every step.
    """
    heads, feed_forward = layer["projections"], layer["feed_forward"]
    before = [
        _after_norm(norm, part[name])
        for norm, part, names in (
            (layer["attention_norm"], heads, ("query", "key", "value")),
            (layer["feed_forward_norm"], feed_forward, ("up", "gate")),
        )
        for name in names
        if name in _parts(config)
    ]
    after = heads["output"], feed_forward["down"]
    joined = {
        "into": {
            name: jnp.concatenate([linear[name] for linear in before], axis=-1)
            for name in ("kernel", "bias")
        },
        "out": {
            "kernel": jnp.concatenate([linear["kernel"] for linear in after]),
            "bias": sum(map(_bias, after)),
        },
    }
    return jax.tree.map(lambda x: x.astype(config.dtype), joined)


def _parts(config: TransformerConfig) -> dict[str, int]:
    """Columns of the matrix into the layer, by what they give."""
    heads, head_dim = config.projections, config.projections.size(config.width)
    hidden = config.feed_forward.hidden
    parts = {
        "query": heads.heads * head_dim,
        "key": heads.groups() * head_dim,
        "value": heads.groups() * head_dim,
        "up": hidden,
    }
    return parts | ({"gate": hidden} if config.feed_forward.gated else {})


def _after_norm(norm: Mapping[str, Any], linear: Mapping[str, Any]) -> dict[str, Array]:
    """A linear map of what a norm gives, as one of what is standardised."""
    kernel, bias = linear["kernel"], _bias(linear)
    if "bias" in norm:
        # in all of float32, which GPUs do not multiply in by default
        bias = bias + jnp.dot(norm["bias"], kernel, precision="highest")
    return {"kernel": norm["scale"][:, None] * kernel, "bias": bias}


def _bias(linear: Mapping[str, Any]) -> Array:
    bias = linear.get("bias")
    return jnp.zeros(linear["kernel"].shape[1]) if bias is None else bias
