"""A model's answers: contexts that questions share, whole rows, and what answers are worth."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stubs import Bytes, Constant, Oracle

from seqeff.evaluation.retrieval import TASKS, Cell, ModelReader, Retrieval, Row, evaluate, score
from seqeff.evaluation.retrieval.example import Example, Question
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    SeparatorAttention,
    TransformerConfig,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENIZER = Bytes()
BOUNDED = SeparatorAttention(
    window=9, initial_tokens=2, separators=3, separator_ids=(46, 32), positions="compact"
)
CONFIG = TransformerConfig(
    vocabulary_size=264,
    width=16,
    layers=2,
    projections=HeadProjections(heads=2),
    feed_forward=FeedForward(hidden=16),
    attention=DenseAttention(),
    dtype="float32",
    attention_backend="reference",
)
ATTENTIONS = {
    "dense": DenseAttention(),
    "bounded": BOUNDED,
    "separators": dataclasses.replace(BOUNDED, separators=None),
    "published": dataclasses.replace(BOUNDED, cache_entries=20),
}
RANDOM = np.random.default_rng(0)


def parameters_of(config):
    return nnx.to_pure_dict(nnx.split(config.make(nnx.Rngs(0)))[1])


def tokens(count):
    return RANDOM.integers(0, 256, count).astype(np.int32)


def reader_of(attention, examples, slots=3):
    config = dataclasses.replace(CONFIG, attention=attention)
    return ModelReader(config, parameters_of(config), TOKENIZER, [examples], slots)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_questions_of_one_context_are_those_of_prompts_of_their_own(name):
    sizes = [(5, 6), (17, 11), (70, 1), (1, 20)]
    questions = [Question(tokens(size), ("x",), wanted, None) for size, wanted in sizes]
    contexts = [tokens(700), tokens(3)]
    shared = [Example(context, tuple(questions)) for context in contexts]
    reader = reader_of(ATTENTIONS[name], shared)
    found = reader.answers(shared)
    read = sum(
        len(context) + sum(size + wanted - 1 for size, wanted in sizes) for context in contexts
    )
    # fewer where the end of text was drawn
    assert read - 80 <= reader.use.tokens <= read
    alone = [Example(context, (question,)) for context in contexts for question in questions]
    expected = reader.answers(alone)
    assert [text for texts in found for text in texts] == [text for (text,) in expected]
    assert len({text for texts in found for text in texts}) > 1


@pytest.mark.parametrize("name", ["dense", "bounded"])
def test_predictions_are_those_of_the_whole_row(name):
    rows = [Row(tokens(40), RANDOM.integers(0, 40, 6), tokens(6)) for _ in range(5)]
    reader = reader_of(ATTENTIONS[name], rows)
    found = reader.predictions(rows)
    assert reader.use.tokens == 200
    if name == "dense":
        assert reader.use.read / 200 == 20.5 and reader.use.resident == 40
    model = dataclasses.replace(CONFIG, attention=ATTENTIONS[name]).make(nnx.Rngs(0))
    for row, best in zip(rows, found, strict=True):
        logits = model.logits(model(jnp.asarray(row.tokens[None])))[0, :, :257]
        np.testing.assert_array_equal(best, np.argmax(logits, -1)[row.places])


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" 12345. The", ["12345"], (1, 1)),
        ("\n12345", ["12345"], (1, 1)),
        (" 123456", ["12345"], (0, 0)),
        (" not 12345", ["12345"], (1, 0)),
        (" A12345", ["12345"], (0, 0)),
        ("", ["12345"], (0, 0)),
        (" B, A, and C, then D", ["A", "B", "C"], (1, 1)),
        (" B and A", ["A", "B", "C", "D"], (0.5, 0)),
        (" A A B", ["A", "B"], (1, 0)),
    ],
)
def test_what_a_continuation_is_worth(text, answers, expected):
    assert score(text, answers) == expected


@pytest.mark.parametrize(("reader", "expected"), [(Oracle(), 1.0), (Constant(), 0.0)])
def test_who_knows_everything_and_who_knows_nothing(reader, expected):
    tasks = {name: task() for name, task in TASKS.items()}
    grid = Retrieval(tasks=tasks, depths=[1.0, 0.0], examples=2)
    results = [result for cell in grid.cells(TOKENIZER, 3000) for result in evaluate(reader, cell)]
    assert {result.task for result in results} == {*TASKS}
    for result in results:
        assert result.recall == result.exact == expected
        assert result.entries_read == 1.5 and result.entries_resident == 4


def test_results_are_by_the_depth_of_the_answer():
    questions = [
        Question(tokens(1), (answer,), 1, depth)
        for answer, depth in (("a", 1.0), ("b", 0.0), ("c", 1.0))
    ]

    class Half(Oracle):
        def answers(self, examples):
            return [["a", "b", "nothing"] for _ in examples]

    cell = Cell("any", 9, None, [Example(tokens(3), tuple(questions))] * 2)
    first, last = evaluate(Half(), cell)
    assert (first.depth, first.questions, first.recall) == (0.0, 2, 1.0)
    assert (last.depth, last.questions, last.recall) == (1.0, 4, 0.5)
    assert first.sha256 == last.sha256
