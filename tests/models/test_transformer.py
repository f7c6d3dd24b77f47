"""The whole model: what its outputs may depend on, and choices that must not change them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import (
    ATTENTIONS,
    SEPARATORS,
    VOCABULARY,
    close,
    documents,
    extending,
    hidden,
    masked_attention,
    naive_mask,
    quick_jit,
    random_model,
    random_tokens,
    small_config,
)

from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    NoPositions,
    SeparatorAttention,
    empty_cache,
    transformer,
)

BATCH, LENGTH = 3, 63
TOKENS = random_tokens(BATCH, LENGTH)
ONE_DOCUMENT = np.zeros_like(TOKENS)
# every attention in one model, a layer each: what any of them leaks reaches the output
KINDS = ("dense", "separator", "bounded", "compact", "fixed", "interval")
CONFIG = small_config(
    layers=len(KINDS),
    layer_attention={layer: ATTENTIONS[name] for layer, name in enumerate(KINDS)},
    feed_forward=FeedForward(hidden=48, activation="relu"),
)


@pytest.fixture(scope="module")
def parts():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def forward(parts):
    """Hidden states of tokens and documents."""
    graph, parameters = parts
    compiled = quick_jit(lambda parameters, *arrays: nnx.merge(graph, parameters)(*arrays))
    return lambda *arrays: np.asarray(compiled(parameters, *arrays))


def other_tokens(tokens):
    return (tokens + 1 + np.arange(tokens.shape[-1]) % (VOCABULARY - 1)) % VOCABULARY


def others_of_the_same_kind(tokens):
    """Separators for separators, words for words."""
    separators = np.asarray(SEPARATORS)
    words = np.setdiff1d(np.arange(VOCABULARY), separators)
    is_separator = np.isin(tokens, separators)
    others = [kind[(np.searchsorted(kind, tokens) + 1) % len(kind)] for kind in (separators, words)]
    assert np.all(np.where(is_separator, *others) != tokens)
    return np.where(is_separator, *others)


@pytest.mark.parametrize("begins", [(0,), (0, 20, 50)], ids=["one", "three"])
def test_no_output_depends_on_later_tokens(forward, begins):
    starts = documents(LENGTH, begins, begins, (0,))
    whole = forward(TOKENS, starts)
    assert np.all(np.isfinite(whole))
    for last in (0, 1, 30, 61):
        changed = np.where(np.arange(LENGTH) > last, other_tokens(TOKENS), TOKENS)
        outputs = forward(changed, starts)
        np.testing.assert_array_equal(outputs[:, : last + 1], whole[:, : last + 1])
        assert np.all(np.any(outputs[:, last + 1 :] != whole[:, last + 1 :], axis=-1))


def test_no_output_depends_on_other_rows(forward):
    starts = documents(LENGTH, (0, 20, 50), (0,), (0, 1))
    whole = forward(TOKENS, starts)
    for row in range(BATCH):
        mates = np.arange(BATCH)[:, None] != row
        tokens = np.where(mates, other_tokens(TOKENS), TOKENS)
        begins = np.where(mates, documents(LENGTH, (0, 62), (0, 9, 10), (0,)), starts)
        np.testing.assert_array_equal(forward(tokens, begins)[row], whole[row])
        moved = np.roll(np.arange(BATCH), row)
        np.testing.assert_array_equal(forward(TOKENS[moved], starts[moved]), whole[moved])


def test_no_output_depends_on_other_documents(forward):
    begins = (0, 20, 21, 50)
    packed = forward(TOKENS, documents(LENGTH, begins, begins, begins))
    for first, end in itertools.pairwise((*begins, LENGTH)):
        elsewhere = (np.arange(LENGTH) < first) | (np.arange(LENGTH) >= end)
        changed = np.where(elsewhere, others_of_the_same_kind(TOKENS), TOKENS)
        outputs = forward(changed, documents(LENGTH, begins, begins, begins))
        np.testing.assert_array_equal(outputs[:, first:end], packed[:, first:end])
        # other separators before it move its packed entries, and sums are rounded in another order
        changed = np.where(elsewhere, other_tokens(TOKENS), TOKENS)
        outputs = forward(changed, documents(LENGTH, begins, begins, begins))
        np.testing.assert_allclose(outputs[:, first:end], packed[:, first:end], rtol=0, atol=1e-6)
        # what follows a document does not matter, so this is the document alone
        alone = forward(np.roll(TOKENS, -first, axis=1), ONE_DOCUMENT)[:, : end - first]
        close(packed[:, first:end], alone)


def test_padding_on_the_left_changes_nothing(forward):
    padding = 9
    padded = np.pad(TOKENS, ((0, 0), (padding, 0)), constant_values=SEPARATORS[0])
    starts = np.full_like(padded, padding)
    outputs = forward(padded, starts)[:, padding:]
    close(outputs, forward(TOKENS, ONE_DOCUMENT))


def test_with_every_token_a_separator_attention_is_dense():
    every = SeparatorAttention(window=4, initial_tokens=1, separator_ids=tuple(range(VOCABULARY)))
    outputs = []
    for attention in (every, DenseAttention()):
        graph, parameters = random_model(small_config(attention=attention))
        outputs.append(np.asarray(nnx.merge(graph, parameters)(TOKENS)))
    close(*outputs)


@pytest.mark.parametrize("chunks", [(31, 31, 1), (1,) * 63], ids=["chunks", "tokens"])
def test_decoding_with_caches_of_several_kinds_equals_the_whole_row(parts, forward, chunks):
    extend = extending(CONFIG, parts[1])
    cache, outputs = empty_cache(CONFIG, BATCH, LENGTH), []
    for first, end in itertools.pairwise(itertools.accumulate(chunks, initial=0)):
        output, cache = extend(TOKENS[:, first:end], cache)
        outputs.append(output)
    np.testing.assert_array_equal(cache.length, LENGTH)
    close(np.concatenate(outputs, axis=1), forward(TOKENS, ONE_DOCUMENT))


@pytest.mark.parametrize(
    ("layer_attention", "expected"),
    [
        ({0: "dense", -1: "window"}, ("dense", "separator", "separator", "window")),
        ({-4: "window", 2: "dense"}, ("window", "separator", "dense", "separator")),
    ],
)
def test_layers_attend_as_they_are_told(layer_attention, expected):
    config = small_config(
        layers=4,
        attention=ATTENTIONS["separator"],
        layer_attention={layer: ATTENTIONS[name] for layer, name in layer_attention.items()},
    )
    assert config.attentions() == tuple(ATTENTIONS[name] for name in expected)


def test_full_layers_ask_for_dense_attention(monkeypatch):
    """One causal source of all tokens, which `auto` gives to cuDNN."""
    config = small_config(
        layers=4,
        attention=ATTENTIONS["separator"],
        layer_attention={0: ATTENTIONS["dense"], -1: ATTENTIONS["dense"]},
    )
    attend, asked = transformer.attend, []

    def watched(queries, sources, backend):
        asked.append(
            [(type(source).__name__, getattr(source, "window", None)) for source in sources]
        )
        return attend(queries, sources, backend)

    monkeypatch.setattr(transformer, "attend", watched)
    jax.eval_shape(lambda tokens: config.make(nnx.Rngs(0))(tokens), TOKENS)
    full, sparse = [("TokenSource", None)], [("RangeSource", None), ("TokenSource", 7)]
    assert asked == [full, sparse, full]


def numpy_model(config, parameters, tokens):
    """Hidden states of a model with RMSNorm and rotary positions and without biases."""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm.epsilon) * scale

    def heads(x, kernel):
        return (x @ kernel).reshape(*x.shape[:2], -1, 8)

    @quick_jit
    def attend(queries, keys, values, mask):
        positions = jnp.broadcast_to(jnp.arange(queries.shape[1]), queries.shape[:2])
        rotation = config.positions.rotation(positions, 8)
        queries, keys = (config.positions.rotate(x, rotation) for x in (queries, keys))
        return masked_attention(queries, keys, values, mask)

    x = np.asarray(parameters["embedding"])[tokens]
    for layer, attention in enumerate(config.attentions()):
        mask = naive_mask(attention, tokens, np.zeros_like(tokens))
        own = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), parameters["layers"])
        kernels = {name: own["projections"][name]["kernel"] for name in own["projections"]}
        normed = norm(x, own["attention_norm"]["scale"])
        split = (heads(normed, kernels[name]) for name in ("query", "key", "value"))
        attended = attend(*split, mask)
        between = x + np.asarray(attended).reshape(*x.shape[:2], -1) @ kernels["output"]
        read = x if config.residual == "parallel" else between
        up, down = (own["feed_forward"][name]["kernel"] for name in ("up", "down"))
        x = between + np.maximum(norm(read, own["feed_forward_norm"]["scale"]) @ up, 0) @ down
    return norm(x, np.asarray(parameters["final_norm"]["scale"]))


DEFINED = small_config(
    layers=3,
    attention=ATTENTIONS["separator"],
    projections=HeadProjections(heads=4, kv_heads=2, bias=False),
    feed_forward=FeedForward(hidden=48, activation="relu", bias=False),
)


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "parallel", "unroll": 2},
        {"residual": "sequential", "layer_attention": {-1: DenseAttention(window=20)}},
    ],
    ids=["parallel", "last layer differs"],
)
def test_the_model_is_its_definition(changes):
    config = dataclasses.replace(DEFINED, **changes)
    graph, parameters = random_model(config)
    expected = numpy_model(config, parameters, TOKENS)
    close(hidden(graph, parameters, TOKENS), expected)


def test_bfloat16_compute_with_float32_parameters():
    config = dataclasses.replace(DEFINED, dtype="bfloat16")
    graph, parameters = random_model(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    outputs = hidden(graph, parameters, TOKENS)
    assert outputs.dtype == jnp.bfloat16
    difference = np.asarray(outputs, np.float32) - numpy_model(config, parameters, TOKENS)
    assert 1e-4 < np.sqrt(np.mean(difference**2)) < 2e-2

    def loss(parameters):
        model = nnx.merge(graph, parameters)
        logits = model.logits(model(TOKENS))
        assert logits.dtype == jnp.float32
        return logits.sum()

    gradients = jax.eval_shape(jax.grad(loss), parameters)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


PLAIN = dataclasses.replace(DEFINED, attention=DenseAttention(), positions=NoPositions())


@pytest.fixture(scope="module")
def training():
    """Loss, gradients and bytes of a training step's temporary arrays."""
    tokens = random_tokens(2, 129)
    target = np.random.default_rng(0).normal(size=(2, 129, 32)).astype(np.float32)
    results = {}

    def run(rematerialise):
        if rematerialise not in results:
            config = dataclasses.replace(
                PLAIN, rematerialise=rematerialise, attention_backend="reference"
            )
            graph, parameters = random_model(config)

            def loss(parameters):
                return ((nnx.merge(graph, parameters)(tokens) - target) ** 2).mean()

            compiled = quick_jit(jax.value_and_grad(loss)).lower(parameters).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            results[rematerialise] = (*compiled(parameters), memory)
        return results[rematerialise]

    return run


@pytest.mark.parametrize("rematerialise", ["nothing", "everything"])
def test_what_is_computed_again_changes_no_value(training, rematerialise):
    loss, gradients, _ = training(rematerialise="elementwise")
    other_loss, other_gradients, _ = training(rematerialise=rematerialise)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    for left, right in zip(*map(jax.tree.leaves, (gradients, other_gradients)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-6)


def test_computing_more_again_keeps_less(training):
    nothing, elementwise, everything = (
        training(rematerialise=mode)[2] for mode in ("nothing", "elementwise", "everything")
    )
    assert everything < elementwise < nothing


def test_elementwise_computes_neither_attention_nor_products_again():
    def count(mode, primitive):
        graph, parameters = random_model(dataclasses.replace(PLAIN, rematerialise=mode))
        jaxpr = jax.make_jaxpr(jax.grad(lambda given: nnx.merge(graph, given)(TOKENS).sum()))
        return str(jaxpr(parameters)).count(primitive)

    for primitive in (" while[", " dot_general["):
        nothing, elementwise, everything = (
            count(mode, primitive) for mode in ("nothing", "elementwise", "everything")
        )
        assert nothing == elementwise < everything


def test_the_head_is_the_embedding_where_they_are_tied():
    graph, parameters = random_model(small_config(tie_embeddings=True))
    model = nnx.merge(graph, parameters)
    states = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    np.testing.assert_allclose(
        model.logits(states), states @ parameters["embedding"].T, rtol=1e-4, atol=1e-4
    )
    graph, parameters = random_model(small_config())
    np.testing.assert_allclose(
        nnx.merge(graph, parameters).logits(states),
        states @ parameters["output_head"].T,
        rtol=1e-4,
        atol=1e-4,
    )
