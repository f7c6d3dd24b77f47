"""One decoder-only Transformer; its parts and its way of attending are chosen by the config."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from seqeff.checks import check_types, require
from seqeff.models import parameters
from seqeff.models.attention import Attention, DenseAttention
from seqeff.models.attention.attend import attend
from seqeff.models.embedding import embed
from seqeff.models.feed_forward import FeedForward
from seqeff.models.initialisation import Initialisation, NormalInitialisation
from seqeff.models.norms import LayerNorm, Norm
from seqeff.models.positions import Positions, Rotary, Rotation
from seqeff.models.projections import HeadProjections
from seqeff_kernels.range_attention import Backend


def _keep_products(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Keeps for the backward pass what is dear to compute: products with weights, and attention."""
    if primitive.name == "dot_general":
        (_, _), batch_dimensions = parameters["dimension_numbers"]
        return not any(batch_dimensions)
    if primitive.name == "name":
        return parameters["name"] == "range_attention"
    return "dot_product_attention" in primitive.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A pre-norm decoder.

    Attributes:
      vocabulary_size: rows of the embedding; at least the tokenizer's.
      width: size of the residual stream.
      layers: number of layers.
      attention: which entries each token attends, in every layer.
      layer_attention: attention of single layers where it differs; -1 is the last layer.
      residual: "parallel" adds attention and feed-forward of the same input (GPT-NeoX),
        "sequential" one after the other.
      tie_embeddings: the output head is the embedding.
      dtype: of activations and matrix products; parameters and softmax are float32.
      rematerialise: what the backward pass computes again: "nothing"; norms, rotations and
        activation functions ("elementwise"), which saves memory and memory traffic; or everything
        inside a layer ("everything").
      unroll: layers that one iteration of the compiled loop holds. More is faster to run and
        slower to compile.
      embedding_gradient: "scatter", or "matmul" for the same bits every time on GPU.
      attention_backend: of `seqeff_kernels.range_attention`.
    """

    vocabulary_size: int
    width: int
    layers: int
    projections: HeadProjections
    feed_forward: FeedForward
    attention: Attention = DenseAttention()
    layer_attention: Mapping[int, Attention] = dataclasses.field(default_factory=dict, hash=False)
    norm: Norm = LayerNorm()
    positions: Positions = Rotary()
    residual: Literal["sequential", "parallel"] = "sequential"
    tie_embeddings: bool = False
    initialisation: Initialisation = NormalInitialisation()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rematerialise: Literal["nothing", "elementwise", "everything"] = "elementwise"
    unroll: int = 1
    embedding_gradient: Literal["scatter", "matmul"] = "scatter"
    attention_backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocabulary_size", "width", "layers", "unroll"):
            value = getattr(self, name)
            require(value >= 1, f"TransformerConfig.{name} = {value} must be at least 1")
        head_dim = self.projections.size(self.width)
        # shapes only: a config must not start the devices
        nnx.eval_shape(lambda: Layer(self, nnx.Rngs(0)))
        position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        jax.eval_shape(lambda position: self.positions.rotation(position, head_dim), position)
        for layer in self.layer_attention:
            require(
                -self.layers <= layer < self.layers,
                f"TransformerConfig.layer_attention names layer {layer}; there are {self.layers}",
            )
            require(
                layer >= 0 or layer + self.layers not in self.layer_attention,
                f"TransformerConfig.layer_attention names one layer as {layer} and as "
                f"{layer + self.layers}; keep one",
            )

    def for_vocabulary(self, vocabulary: Sequence[str]) -> Self:
        """This config with every attention knowing the decoded text of every token id."""
        require(
            len(vocabulary) <= self.vocabulary_size,
            f"TransformerConfig.vocabulary_size = {self.vocabulary_size} is below the tokenizer's "
            f"{len(vocabulary)} tokens",
        )
        return dataclasses.replace(
            self,
            attention=self.attention.for_vocabulary(vocabulary),
            layer_attention={
                layer: attention.for_vocabulary(vocabulary)
                for layer, attention in self.layer_attention.items()
            },
        )

    def attentions(self) -> tuple[Attention, ...]:
        """The attention of each layer."""
        given = {layer % self.layers: method for layer, method in self.layer_attention.items()}
        return tuple(given.get(layer, self.attention) for layer in range(self.layers))

    def runs(self) -> Iterator[tuple[Attention, int, int]]:
        """Neighbouring layers that attend alike: the attention, the first layer, one past the last.

        Each run is compiled as one loop.
        """
        first = 0
        for attention, layers in itertools.groupby(self.attentions()):
            end = first + len(list(layers))
            yield attention, first, end
            first = end

    def make(self, rngs: nnx.Rngs) -> Transformer:
        return Transformer(self, rngs)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for decoding with any attention.

    `tokens` [batch, capacity] and `keys`, `values` [layers, batch, capacity, kv_heads, head_dim]
    are filled up to `length`, which all rows share. A row is one document.
    """

    tokens: Int[Array, "batch capacity"]
    keys: Float[Array, "layers batch capacity kv_heads head_dim"]
    values: Float[Array, "layers batch capacity kv_heads head_dim"]
    length: Int[Array, ""]


class _Step(NamedTuple):
    """What all layers share in one call."""

    rotation: Rotation | None
    first_row: Int[Array, ""] | int


class Layer(nnx.Module):
    """Attention and feed-forward around the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        shape = (config.width, config.layers, config.initialisation)
        self.config = config
        self.attention_norm = config.norm.make(config.width)
        self.projections = config.projections.make(*shape, rngs)
        self.feed_forward_norm = config.norm.make(config.width)
        self.feed_forward = config.feed_forward.make(*shape, rngs)

    def __call__(
        self,
        x: Float[Array, "batch rows width"],
        attention: Attention,
        plan: Any,
        step: _Step,
        cache: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[Float[Array, "batch rows width"], tuple[jax.Array, jax.Array] | None]:
        x = parameters.constrain(x, None, None)
        attended, cache = self._attend(self.attention_norm(x), attention, plan, step, cache)
        if self.config.residual == "parallel":
            return x + attended + self.feed_forward(self.feed_forward_norm(x)), cache
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), cache

    def _attend(
        self,
        x: jax.Array,
        attention: Attention,
        plan: Any,
        step: _Step,
        cache: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        queries, keys, values = self.projections.split(x)
        if step.rotation is not None:
            queries = self.config.positions.rotate(queries, step.rotation)
            keys = self.config.positions.rotate(keys, step.rotation)
        if cache is not None:
            start = (0, step.first_row, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache[0], keys.astype(cache[0].dtype), start)
            values = jax.lax.dynamic_update_slice(cache[1], values.astype(cache[1].dtype), start)
            cache = keys, values
        sources = attention.sources(plan, keys, values, step.first_row, x.shape[1])
        attended = attend(queries, sources, self.config.attention_backend)
        return self.projections.merge(attended), cache


class Transformer(nnx.Module):
    """Token ids to final hidden states; `head()` turns those into logits.

    The layers' parameters are stacked on a leading axis, and layers that attend alike run as one
    loop, so compilation does not grow with depth.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        std = config.initialisation.embedding_std(config.width)
        vocabulary = (config.vocabulary_size, config.width)
        partition = PartitionSpec("tensor", "fsdp")
        self.config = config
        self.embedding = parameters.normal(rngs, vocabulary, std, partition)
        self.position_embedding = config.positions.embedding(config.width, std, rngs)
        self.layers = _stack(config, rngs)
        self.final_norm = config.norm.make(config.width)
        head_std = config.initialisation.input_std(config.width)
        self.output_head = (
            None
            if config.tie_embeddings
            else parameters.normal(rngs, vocabulary, head_std, partition)
        )

    def head(self) -> Float[Array, "vocabulary width"]:
        """The matrix whose product with a hidden state is the logits."""
        return (self.embedding if self.output_head is None else self.output_head)[...]

    def logits(
        self, hidden: Float[Array, "batch rows width"]
    ) -> Float[Array, "batch rows vocabulary"]:
        """Float32 logits of every row: for sampling; training uses `cross_entropy`."""
        head = self.head().astype(hidden.dtype)
        return jnp.einsum("brw,vw->brv", hidden, head, preferred_element_type=jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "batch rows"],
        document_start: Int[Array, "batch rows"] | None = None,
    ) -> Float[Array, "batch rows width"]:
        """Final hidden states of whole rows.

        Args:
          document_start: row index of the first token of each token's document; None: a row is
            attended from its beginning.
        """
        rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        positions = rows if document_start is None else rows - document_start
        return self._run(tokens, positions, tokens, document_start, first_row=0, cache=None)[0]

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A cache for `capacity` tokens a row."""
        config = self.config
        heads, head_dim = config.projections.groups(), config.projections.size(config.width)
        shape = (config.layers, batch, capacity, heads, head_dim)
        zeros = jnp.zeros(shape, config.dtype)
        tokens = jnp.zeros((batch, capacity), jnp.int32)
        return Cache(tokens, zeros, zeros, jnp.zeros((), jnp.int32))

    def extend(
        self, tokens: Int[Array, "batch rows"], cache: Cache
    ) -> tuple[Float[Array, "batch rows width"], Cache]:
        """Final hidden states of tokens that follow the cache's, and the cache with them in it.

        The caller keeps `cache.length + rows` within the capacity.
        """
        seen = jax.lax.dynamic_update_slice(cache.tokens, tokens, (0, cache.length))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) + cache.length
        hidden, (keys, values) = self._run(
            tokens, positions, seen, None, cache.length, (cache.keys, cache.values)
        )
        return hidden, Cache(seen, keys, values, cache.length + tokens.shape[1])

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        context: jax.Array,
        document_start: jax.Array | None,
        first_row: jax.Array | int,
        cache: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, Any]:
        """All layers over `tokens`, rows [first_row, ...) of `context`."""
        config = self.config
        table = parameters.whole_rows(self.embedding[...])
        x = embed(table, tokens, jnp.dtype(config.dtype), config.embedding_gradient)
        if self.position_embedding is not None:
            table = self.position_embedding[...]
            require(
                context.shape[1] <= table.shape[0],
                f"LearnedPositions.length = {table.shape[0]} is below the row's "
                f"{context.shape[1]} tokens",
            )
            x = x + jnp.take(table, positions, axis=0).astype(x.dtype)
        head_dim = config.projections.size(config.width)
        step = _Step(config.positions.rotation(positions, head_dim), first_row)
        graph, stacked = nnx.split(self.layers)
        caches = []
        plans: list[tuple[Attention, Any]] = []
        for attention, first, end in config.runs():
            plan = next((plan for method, plan in plans if method == attention), None)
            if plan is None:
                plan = attention.plan(context, document_start)
                plans.append((attention, plan))

            layer = self._rematerialised(functools.partial(_layer, graph, attention, plan, step))
            part = slice(first, end)
            inputs = jax.tree.map(operator.itemgetter(part), (stacked, cache))
            x, layer_cache = jax.lax.scan(layer, x, inputs, unroll=min(config.unroll, end - first))
            caches.append(layer_cache)
        if cache is not None:
            cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        return self.final_norm(x), cache

    def _rematerialised(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        if self.config.rematerialise == "nothing":
            return layer
        policy = _keep_products if self.config.rematerialise == "elementwise" else None
        # a loop keeps the two computations apart; a fully unrolled one may share them again
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _layer(
    graph: nnx.GraphDef,
    attention: Attention,
    plan: Any,
    step: _Step,
    x: jax.Array,
    inputs: tuple[Any, Any],
) -> tuple[jax.Array, Any]:
    """The body of the loop over layers."""
    state, cache = inputs
    return nnx.merge(graph, state)(x, attention, plan, step, cache)


def _stack(config: TransformerConfig, rngs: nnx.Rngs) -> Layer:
    """One layer module whose every parameter has a leading axis of layers."""
    graph = nnx.split(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), config.layers)
    return nnx.merge(graph, jax.vmap(lambda key: nnx.split(Layer(config, nnx.Rngs(key)))[1])(keys))
