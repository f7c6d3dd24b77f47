"""One decoder-only Transformer; its parts and its way of attending are chosen by the config."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from seqeff.checks import check_types, require
from seqeff.models import parameters
from seqeff.models.attend import attend
from seqeff.models.attention import Attention, DenseAttention
from seqeff.models.embedding import embed
from seqeff.models.feed_forward import FeedForward
from seqeff.models.heads import Heads
from seqeff.models.initialisation import Initialisation, NormalInitialisation
from seqeff.models.norms import LayerNorm, Norm
from seqeff.models.positions import Located, Positions, Rotary, Rotation
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
            positions=self.positions.for_vocabulary(vocabulary),
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

    def require_positions(self, length: int) -> None:
        """Raises a ConfigError if the positions' table is shorter than a row."""
        name, limit = type(self.positions).__name__, self.positions.limit
        require(
            limit is None or length <= limit,
            f"{name}.length = {limit} is below the row's {length} tokens",
        )

    def make(self, rngs: nnx.Rngs) -> Transformer:
        return Transformer(self, rngs)


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
        attend: Callable[[Heads], Float[Array, "batch rows heads head_dim"]],
        rotation: Rotation | None,
    ) -> Float[Array, "batch rows width"]:
        """
        Args:
          attend: from the layer's heads to what they attend.
        """
        x = parameters.constrain(x, None, None)
        heads = self.projections.split(self.attention_norm(x))
        attended = self.projections.merge(attend(rotated(self.config, *heads, rotation)))
        if self.config.residual == "parallel":
            return x + attended + self.feed_forward(self.feed_forward_norm(x))
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x))


def rotated(
    config: TransformerConfig,
    queries: Float[Array, "batch rows heads head_dim"],
    keys: Float[Array, "batch rows kv_heads head_dim"],
    values: Float[Array, "batch rows kv_heads head_dim"],
    rotation: Rotation | None,
) -> Heads:
    """A layer's heads, rotated by their positions."""
    positions, head_dim = config.positions, queries.shape[-1]

    def turn(x: jax.Array, by: jax.Array) -> jax.Array:
        further = positions.rotation(by, head_dim, further=True)
        assert further is not None
        return positions.rotate(x, further)

    if rotation is not None:
        queries, keys = (positions.rotate(x, rotation) for x in (queries, keys))
    return Heads(queries, keys, values, turn if positions.by_place else None)


class LanguageModel(nnx.Module):
    """What comes before and after the layers: embedding, positions, final norm and output head."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        std = config.initialisation.embedding_std(config.width)
        vocabulary = (config.vocabulary_size, config.width)
        partition = PartitionSpec("tensor", "fsdp")
        self.config = config
        self.embedding = parameters.normal(rngs, vocabulary, std, partition)
        self.position_embedding = config.positions.embedding(config.width, std, rngs)
        self.layers = self.make_layers(config, rngs)
        self.final_norm = config.norm.make(config.width)
        head_std = config.initialisation.input_std(config.width)
        self.output_head = (
            None
            if config.tie_embeddings
            else parameters.normal(rngs, vocabulary, head_std, partition)
        )

    def make_layers(self, config: TransformerConfig, rngs: nnx.Rngs) -> Any:
        """The layers, as the model that has them runs them."""
        raise NotImplementedError

    def head(self) -> Float[Array, "vocabulary width"]:
        """The matrix whose product with a hidden state is the logits."""
        return (self.embedding if self.output_head is None else self.output_head)[...]

    def logits(
        self, hidden: Float[Array, "batch rows width"]
    ) -> Float[Array, "batch rows vocabulary"]:
        """Float32 logits of every row: for sampling; training uses `cross_entropy`."""
        head = self.head().astype(hidden.dtype)
        return jnp.einsum("brw,vw->brv", hidden, head, preferred_element_type=jnp.float32)

    def embed(
        self, tokens: Int[Array, "batch rows"], located: Located
    ) -> tuple[Float[Array, "batch rows width"], Rotation | None]:
        """Embedded tokens, and the rotation of their heads."""
        config = self.config
        table = parameters.whole_rows(self.embedding[...])
        x = embed(table, tokens, jnp.dtype(config.dtype), config.embedding_gradient)
        if self.position_embedding is not None:
            table = self.position_embedding[...]
            # tokens that are passed over may lie past the table
            x = x + jnp.take(table, located.embedded, axis=0, mode="clip").astype(x.dtype)
        head_dim = config.projections.size(config.width)
        return x, config.positions.rotation(located.rotated, head_dim)


class Transformer(LanguageModel):
    """Token ids to final hidden states; `head()` turns those into logits.

    The layers' parameters are stacked on a leading axis, and layers that attend alike run as one
    loop, so compilation does not grow with depth.
    """

    def make_layers(self, config: TransformerConfig, rngs: nnx.Rngs) -> Layer:
        return _stack(config, rngs)

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
        config = self.config
        config.require_positions(tokens.shape[1])
        rows = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        index = rows if document_start is None else rows - document_start
        carried = config.positions.carry(tokens.shape[0])
        located, _ = config.positions.locate(tokens, index, carried, None)
        x, rotation = self.embed(tokens, located)
        plans: list[tuple[Attention, Any]] = []
        for attention, first, end in config.runs():
            plan = next((plan for method, plan in plans if method == attention), None)
            if plan is None:
                plan = attention.plan(tokens, document_start)
                plans.append((attention, plan))

            def attend_all(
                heads: Heads, attention: Attention = attention, plan: Any = plan
            ) -> jax.Array:
                sources = attention.sources(plan, heads, 0)
                return attend(heads.queries, sources, config.attention_backend)

            x = self._run(x, attend_all, rotation, slice(first, end))
        return self.final_norm(x)

    def _run(
        self,
        x: jax.Array,
        attend: Callable[[Heads], jax.Array],
        rotation: Rotation | None,
        part: slice,
    ) -> jax.Array:
        """Neighbouring layers, as a loop."""
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, state)(x, attend, rotation), None

        states = jax.tree.map(operator.itemgetter(part), stacked)
        unroll = min(self.config.unroll, part.stop - part.start)
        return jax.lax.scan(self._rematerialised(layer), x, states, unroll=unroll)[0]

    def _rematerialised(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        if self.config.rematerialise == "nothing":
            return layer
        policy = _keep_products if self.config.rematerialise == "elementwise" else None
        # a loop keeps the two computations apart; a fully unrolled one may share them again
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _stack(config: TransformerConfig, rngs: nnx.Rngs) -> Layer:
    """One layer module whose every parameter has a leading axis of layers."""
    graph = nnx.split(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), config.layers)
    return nnx.merge(graph, jax.vmap(lambda key: nnx.split(Layer(config, nnx.Rngs(key)))[1])(keys))
