"""The model that takes its tokens a few at a time: for decoding, and for texts without end."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqeff.models.caches import (
    BlockCache,
    CacheKind,
    LayersCache,
    Sizes,
    aligned,
    kind_of,
    where_rows,
)
from seqeff.models.heads import Heads
from seqeff.models.joined import JoinedLayer, joined_parameters, joins
from seqeff.models.positions import Rotation
from seqeff.models.transformer import LanguageModel, Layer, TransformerConfig


class Cache(NamedTuple):
    """What a model remembers of rows while it decodes. A row is one document.

    The batch is the first axis of every array (`caches.select_rows`, `caches.replace_rows`).

    Attributes:
      length: tokens so far.
      located: what the positions carry on.
      layers: of each run of layers that attend alike.
    """

    length: Int[Array, " batch"]
    located: Any
    layers: tuple[LayersCache, ...]


def empty_cache(
    config: TransformerConfig, batch: int, capacity: int, kept: int | None = None
) -> Cache:
    """A cache of rows without tokens, for up to `capacity` of them where it grows.

    Args:
      kept: most tokens of a row that attentions of chosen tokens keep (`most_kept`); None: all.

    Raises:
      ConfigError: the positions' table is shorter.
    """
    config.require_positions(capacity)
    kept = capacity if kept is None else min(kept, capacity)
    return cache_of_sizes(config, batch, aligned(capacity), aligned(kept))


def cache_of_sizes(config: TransformerConfig, batch: int, capacity: int, kept: int) -> Cache:
    """The same with exactly so many slots, which may be symbolic dimensions of `jax.export`."""
    heads = config.projections
    size = heads.size(config.width)
    sizes = Sizes(batch, capacity, kept, heads.groups(), size, config.dtype)
    layers = tuple(
        LayersCache.empty(kind_of(attention), end - first, sizes)
        for attention, first, end in config.runs()
    )
    return Cache(jnp.zeros(batch, jnp.int32), config.positions.carry(batch), layers)


def emptied_rows(cache: Cache, rows: Bool[Array, " batch"]) -> Cache:
    """The cache without the tokens of these rows, which others can take."""

    def emptied(state: Any) -> Any:
        # a state without tokens is all zeros, and the arrays then hold nothing that is read
        return where_rows(rows, jax.tree.map(jnp.zeros_like, state), state)

    runs = (dataclasses.replace(run, state=emptied(run.state)) for run in cache.layers)
    return Cache(emptied(cache.length), emptied(cache.located), tuple(runs))


def most_kept(config: TransformerConfig, tokens: Int[Array, "batch length"], further: int) -> int:
    """Most tokens of a row that growing caches of chosen tokens keep, for `empty_cache`.

    Args:
      tokens: of the rows, from their first.
      further: tokens of a row after them, all of which may be chosen.
    """
    kinds = {kind_of(attention) for attention in config.attentions()}
    choosers = [k.chooser for k in kinds if isinstance(k, BlockCache) and k.grows]
    if not choosers:
        return further
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    counts = [chooser.are_separators(tokens, index).sum(1).max() for chooser in choosers]
    return int(max(counts)) + further


def cached_parameters(config: TransformerConfig, parameters: Any) -> Any:
    """Parameters of a `CachedTransformer` from those of the `Transformer`, as pure dicts.

    Each layer has its own, joined where that can be (`joined.py`). Matrices are of the activations'
    type, in which they are multiplied: a step that takes one token is bound by reading them.
    """

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(config.dtype) if x.ndim >= 2 else x

    layers = {
        layer: jax.tree.map(operator.itemgetter(layer), parameters["layers"])
        for layer in range(config.layers)
    }
    if joins(config):
        layers = {layer: joined_parameters(config, own) for layer, own in layers.items()}
    return jax.tree.map(cast, {**parameters, "layers": layers})


class CachedTransformer(LanguageModel):
    """Tokens and a cache to final hidden states and the cache with them.

    Every layer has parameters and a cache of its own, so that caches are updated in place.
    """

    def make_layers(self, config: TransformerConfig, rngs: nnx.Rngs) -> nnx.List[nnx.Module]:
        make = JoinedLayer if joins(config) else Layer
        return nnx.List([make(config, rngs) for _ in range(config.layers)])

    @classmethod
    def of(cls, config: TransformerConfig, parameters: Any) -> CachedTransformer:
        """The model with given `cached_parameters`."""
        graph = nnx.split(nnx.eval_shape(lambda: cls(config, nnx.Rngs(0))))[0]
        return nnx.merge(graph, parameters)

    def extend(
        self,
        tokens: Int[Array, "batch rows"],
        cache: Cache,
        count: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch rows width"], Cache]:
        """Final hidden states of tokens that follow the cache's, and the cache with them in it.

        Args:
          count: how many of each row's tokens are real; what follows them is passed over, and its
            states are of no meaning. None: all.

        The states of a row with more tokens than its cache has room for, or the positions' table
        has vectors, are NaN from then on.
        """
        batch, rows = tokens.shape
        count = jnp.full(batch, rows, jnp.int32) if count is None else count
        config = self.config
        index = cache.length[:, None] + jnp.arange(rows)
        located, carried = config.positions.locate(tokens, index, cache.located, count)
        x, rotation = self.embed(tokens, located)
        runs = []
        for (_, first, _), run in zip(config.runs(), cache.layers, strict=True):
            kind = run.kind
            step, state = kind.begin(run.state, tokens, count)
            after = []
            for layer, arrays in enumerate(run.arrays, first):
                x, arrays = self._layer(layer, x, rotation, kind, step, arrays)
                after.append(arrays)
            arrays = tuple(kind.settle(step, after))
            runs.append(dataclasses.replace(run, state=state, arrays=arrays))
        cache = Cache(cache.length + count, carried, tuple(runs))
        overflows = jnp.zeros(batch, bool)
        for run in cache.layers:
            overflows |= run.kind.overflows(run.state, run.arrays[0])
        if config.positions.limit is not None:
            overflows |= cache.length > config.positions.limit
        return jnp.where(overflows[:, None, None], jnp.nan, self.final_norm(x)), cache

    def _layer(
        self,
        layer: int,
        x: jax.Array,
        rotation: Rotation | None,
        kind: CacheKind,
        step: Any,
        arrays: Any,
    ) -> tuple[jax.Array, Any]:
        """A layer's output, and its arrays with the new tokens."""

        def attend(heads: Heads) -> jax.Array:
            nonlocal arrays
            attended, arrays = kind.attend(step, arrays, heads, self.config.attention_backend)
            return attended

        x = self.layers[layer](x, attend, rotation)
        return x, arrays
