"""How likely continuations are, beside each row by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqeff.evaluation.harness.likelihood import Likelihoods, Pair, Score
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    SeparatorAttention,
    TransformerConfig,
)

VOCABULARY, LENGTH = 41, 70
ATTENTIONS = {
    "dense": DenseAttention(),
    "separators": SeparatorAttention(
        window=5, initial_tokens=2, separators=3, separator_ids=(0, 3, 7), positions="compact"
    ),
    "window": DenseAttention(window=9),
}
LAYERS = {0: DenseAttention(), 1: DenseAttention(window=4)}


def random_model(attention, **changes):
    config = TransformerConfig(
        vocabulary_size=VOCABULARY,
        width=16,
        layers=3,
        projections=HeadProjections(heads=2),
        feed_forward=FeedForward(hidden=24),
        attention=attention,
        **{"dtype": "float32", "attention_backend": "reference", **changes},
    )
    graph, state = nnx.split(config.make(nnx.Rngs(0)))
    random = np.random.default_rng(0)
    parameters = jax.tree.map(lambda x: random.normal(0, 0.4, x.shape).astype(np.float32), state)
    return config, graph, parameters


@pytest.mark.parametrize("attention", [*ATTENTIONS, "layers"])
def test_scores(attention, quick_compilation):
    changes = {"layer_attention": LAYERS} if attention == "layers" else {}
    attention = "separators" if changes else attention
    config, graph, parameters = random_model(ATTENTIONS[attention], **changes)

    @jax.jit
    def row_logits(tokens):
        model = nnx.merge(graph, parameters)
        return model.logits(model(tokens[None]))[0]

    def logits(tokens):
        return np.asarray(row_logits(jnp.asarray(tokens, jnp.int32)), np.float64)

    def expected(context, continuation):
        tokens = [*context, *continuation][-LENGTH - 1 :]
        rows = logits(tokens[:-1])[-len(continuation) :]
        chances = rows - np.log(np.exp(rows).sum(1, keepdims=True))
        total = sum(chance[token] for chance, token in zip(chances, continuation, strict=True))
        return Score(total, list(rows.argmax(1)) == list(continuation))

    random = np.random.default_rng(1)
    # rows of 1, 64 and 70 tokens
    lengths = [(1, 1), (64, 1), (60, 5), (3, 62), (69, 2), (99, 3), (1, LENGTH)]
    pairs = [
        Pair(*(random.integers(0, VOCABULARY, n).tolist() for n in sizes)) for sizes in lengths
    ]
    question = pairs[1].context
    pairs += [Pair(question, (token,)) for token in (4, int(logits(question)[-1].argmax()), 9)]
    read = []
    likelihoods = Likelihoods(config, parameters, rows=3, length=LENGTH)
    found = likelihoods.scores(pairs, read.append)
    for pair, score in zip(pairs, found, strict=True):
        wanted = expected(*pair)
        np.testing.assert_allclose(score.log_probability, wanted.log_probability, atol=1e-4)
        assert score.is_greedy == wanted.is_greedy
    assert [score.is_greedy for score in found[-3:]] == [False, True, False]
    assert sum(read) == len(pairs)
    alone = Likelihoods(config, parameters, rows=1, length=LENGTH).scores(pairs[::-1])[::-1]
    for score, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(score.log_probability, other.log_probability, atol=1e-5)
    assert likelihoods.scores([]) == []


def test_a_pair_has_the_same_shapes_and_bits_in_any_company():
    config, _, parameters = random_model(ATTENTIONS["separators"], dtype="bfloat16")
    likelihoods = Likelihoods(config, parameters, rows=4, length=200)
    shapes = {}
    read = likelihoods._read

    def spied(parameters, tokens):
        for row in tokens:
            shapes.setdefault(tuple(np.trim_zeros(row, "b")), set()).add(tokens.shape)
        return read(parameters, tokens)

    likelihoods._read = spied
    random = np.random.default_rng(2)
    lengths = (3, 20, 61, 62, 63, 100, 125, 126, 140, 190, 197, 198)
    pairs = [Pair(*(random.integers(1, VOCABULARY, n).tolist() for n in (x, 3))) for x in lengths]
    together = likelihoods.scores(pairs)
    assert together == [likelihoods.scores([pair])[0] for pair in pairs]
    # of those without a pair
    shapes.pop(())
    assert [len(found) for found in shapes.values()] == [1] * len(pairs)
