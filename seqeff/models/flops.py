"""How many parameters a model has and how many operations a token costs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from seqeff.models.cached import Cache
from seqeff.models.caches import CachedAttention
from seqeff.models.heads import Heads
from seqeff.models.transformer import Transformer, TransformerConfig


def parameter_count(config: TransformerConfig) -> int:
    """Number of parameters, the embedding included."""
    shapes = nnx.split(abstract_model(config))[1]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def abstract_model(config: TransformerConfig) -> Transformer:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))


def matmul_parameters(config: TransformerConfig) -> int:
    """Parameters that every token is multiplied with: matrices of the layers, and the head."""
    layers = nnx.to_pure_dict(nnx.split(abstract_model(config).layers)[1])
    matrices = (leaf for leaf in jax.tree.leaves(layers) if leaf.ndim >= 3)
    return sum(math.prod(leaf.shape) for leaf in matrices) + config.vocabulary_size * config.width


def entries_of_tokens(
    config: TransformerConfig,
    tokens: Int[Array, "batch length"],
    document_start: Int[Array, "batch length"] | None,
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
    """Entries that each token attends, itself included, in the mean over the layers.

    Also the most that a layer holds after it, of its document: what it attends, or every token
    where the attention has no cache of its own.
    """
    empty = jnp.zeros((*tokens.shape, 1, 1), jnp.float32)
    heads = Heads(empty, empty, empty, turn=lambda x, _: x)
    mean, most = (jnp.zeros(tokens.shape, jnp.float32) for _ in range(2))
    so_far = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.float32)
    if document_start is not None:
        so_far = so_far - document_start
    for attention, first, end in config.runs():
        entries = jnp.zeros(tokens.shape, jnp.float32)
        for source in attention.sources(attention.plan(tokens, document_start), heads, 0):
            start, stop = source.bounds(tokens.shape[1])
            entries += jnp.maximum(stop - start, 0)[:, 0]
        mean += (end - first) / config.layers * entries
        most = jnp.maximum(most, entries if isinstance(attention, CachedAttention) else so_far)
    return mean, most


def entries_of_cache(
    config: TransformerConfig,
    cache: Cache,
    tokens: Int[Array, "batch rows"],
    count: Int[Array, " batch"],
) -> tuple[Float[Array, "batch rows"], Int[Array, " batch"]]:
    """Entries that tokens read which follow a cache's: mean over the layers; the most in a layer.

    Args:
      count: how many of each row's tokens are real; what the others read is of no meaning.
    """
    mean, most = jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape[0], jnp.int32)
    for (_, first, end), layers in zip(config.runs(), cache.layers, strict=True):
        read, resident = layers.entries(tokens, count)
        mean += (end - first) / config.layers * read
        most = jnp.maximum(most, resident)
    return mean, most


def attended_entries(
    config: TransformerConfig,
    tokens: Int[Array, "batch length"],
    document_start: Int[Array, "batch length"] | None,
) -> float:
    """Mean number of entries that a token attends, summed over the layers, for given tokens."""

    @jax.jit
    def count(tokens: jax.Array, document_start: jax.Array | None) -> jax.Array:
        mean, _ = entries_of_tokens(config, tokens, document_start)
        return config.layers * mean.mean()

    return float(count(tokens, document_start))


def forward_flops_per_token(config: TransformerConfig, entries: float) -> float:
    """Operations of the forward pass a token: 2 a matrix parameter, 4 a dimension of an entry.

    Args:
      entries: attended entries, summed over the layers (`attended_entries`).
    """
    heads, head_dim = config.projections.heads, config.projections.size(config.width)
    return 2 * matmul_parameters(config) + 4 * entries * heads * head_dim


def training_flops_per_token(config: TransformerConfig, entries: float) -> float:
    """Operations of forward and backward, three times the forward's; recomputation not counted."""
    return 3 * forward_flops_per_token(config, entries)
