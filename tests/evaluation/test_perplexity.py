"""Scores of held-out documents."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_run import refused, seqeff, validations_of

from seqeff.data import Batch, ByteLengths
from seqeff.evaluation import Perplexity, make_evaluate
from seqeff.models.flops import abstract_model

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_totals_become_means():
    result = Perplexity(nats=6 * math.log(2), tokens=3, bytes=4)
    assert result.loss == pytest.approx(2 * math.log(2))
    assert result.perplexity == pytest.approx(4)
    assert result.bits_per_byte == pytest.approx(1.5)
    nothing = Perplexity(nats=0.0, tokens=0, bytes=0)
    assert nothing.loss == nothing.bits_per_byte == 0
    assert math.isfinite(Perplexity(nats=1e9, tokens=1, bytes=1).perplexity)


@nnx.jit
def scores_of(model, tokens):
    return jax.nn.log_softmax(model.logits(model(tokens)))


def test_sums_are_those_of_a_loop_over_tokens(tiny):
    config = tiny.load().model
    model = config.make(nnx.Rngs(0))
    graph, _ = nnx.split(abstract_model(config))
    parameters = nnx.to_pure_dict(nnx.split(model)[1])
    choose = np.random.default_rng(0)
    inside, first = choose.integers(0, 9, (2, 300)).astype(np.int32)
    lengths = ByteLengths(inside, first, begin=3)
    batches = []
    for _ in range(2):
        tokens = choose.integers(0, 300, (3, 18)).astype(np.int32)
        tokens[:, 5] = 3
        weights = (choose.random((3, 17)) < 0.6).astype(np.float32)
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], weights, None))
    (result,) = make_evaluate(graph, lengths)(parameters, batches)

    nats, tokens, size, read = 0.0, 0, 0, 0
    for batch in batches:
        scores = scores_of(model, batch.tokens)
        for row, place in zip(*np.nonzero(batch.loss_weights), strict=True):
            target = batch.targets[row, place]
            nats -= float(scores[row, place, target])
            tokens += 1
            begins = batch.tokens[row, place] == 3
            size += int((first if begins else inside)[target])
            read += place + 1
    assert (result.tokens, result.bytes) == (tokens, size)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert (result.read, result.resident) == (read, 17)


def test_scores_by_position_are_those_of_the_masked_tokens(tiny):
    model = tiny.load().model.make(nnx.Rngs(0))
    graph, _ = nnx.split(abstract_model(tiny.load().model))
    parameters = nnx.to_pure_dict(nnx.split(model)[1])
    choose, ones = np.random.default_rng(1), np.ones(300, np.int32)
    lengths = ByteLengths(ones, ones, begin=0)
    tokens = choose.integers(0, 300, (2, 19)).astype(np.int32)
    start = np.array([[0] * 18, [0] * 7 + [7] * 11], np.int32)
    weights = np.ones((2, 18), np.float32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, start)
    evaluate = make_evaluate(graph, lengths, parts=3)
    found = evaluate(parameters, [batch, batch])
    place = np.arange(18) - start
    for part, result in enumerate(found):
        chosen = (place // 6 == part).astype(np.float32)
        (alone,) = make_evaluate(graph, lengths)(
            parameters, [batch._replace(loss_weights=weights * chosen)]
        )
        assert result.tokens == 2 * alone.tokens == 2 * chosen.sum()
        assert result.nats == pytest.approx(2 * alone.nats, rel=1e-5)
        assert result.entries_read == pytest.approx(alone.entries_read)
    total = Perplexity.total(found)
    assert (total.tokens, total.resident) == (72, 18)


def test_eval_tells_scores_by_position_and_writes_them(finished, tmp_path):
    file = tmp_path / "scores.json"
    result = seqeff("eval", finished, "--positions", 4, "--json", file)
    assert result.status == 0, result.errors
    *whole, header = result.output.splitlines()[:8]
    assert whole == seqeff("eval", finished).output.splitlines()
    assert header.split()[:2] == ["positions", "tokens"]
    rows = result.output.splitlines()[8:]
    assert [row.split()[0] for row in rows] == ["0-7", "8-15", "16-23", "24-31"]
    report = json.loads(file.read_text())
    first, *others = report["results"]
    assert len(others) == 4 and others[-1]["positions"] == [24, 31]
    assert first["tokens"] == sum(row["tokens"] for row in others)
    data = json.loads((finished / "data.json").read_text())
    assert [row["sha256"] for row in report["results"]] == data["validation"] * 5
    assert report["tokenizer"] == data["tokenizer"] and report["seeds"] == {}
    assert (report["run"], report["step"]) == (str(finished), 24)
    assert report["config"].endswith((finished / "operative_config.gin").read_text())
    assert "more positions than the 32 of a row" in refused("eval", finished, "--positions", 33)


def test_eval_repeats_the_runs_last_validation(finished):
    line = validations_of(finished)[-1]
    result = seqeff("eval", finished)
    assert result.status == 0, result.errors
    printed = dict(line.rsplit(" ", 1) for line in result.output.splitlines())
    assert printed["loss"] == f"{line['validation/loss']:.4f}"
    assert printed["perplexity"] == f"{line['validation/perplexity']:.2f}"
    assert printed["bits per byte"] == f"{line['validation/bits_per_byte']:.4f}"
    assert printed["tokens"] == str(line["validation/tokens"])
    assert printed["bytes"] == str(line["validation/bytes"])
    assert printed["entries read"] == f"{line['validation/entries_read']:.1f}"
    assert printed["entries resident"] == str(line["validation/entries_resident"])


def test_an_earlier_checkpoint_and_fewer_batches(finished):
    whole = seqeff("eval", finished).output
    assert seqeff("eval", finished, "--checkpoint", 20).output != whole
    fewer = seqeff("eval", finished, "--batches", 1).output
    assert int(fewer.split("tokens ")[1].split()[0]) <= 4 * 32


def test_eval_says_what_it_does_not_score(finished, tmp_path):
    published = [
        "--gin.TransformerConfig.attention=@SeparatorAttention()",
        "--gin.SeparatorAttention.window=9",
        "--gin.SeparatorAttention.separators=3",
        "--gin.SeparatorAttention.cache_entries=20",
    ]
    result = seqeff("eval", finished, "--batches", 1, *published)
    assert result.status == 0, result.errors
    assert "with the mask, not with the cache of SeparatorAttention.cache_entries" in result.errors
    file = tmp_path / "found.json"
    asked = ["--lengths", 32, "--examples", 1, "--gin.AssociativeRecall.pairs=2", "--seed", 0]
    asked += ["--json", file]
    result = seqeff("eval", finished, "--retrieval", "mqar", *asked, *published)
    assert result.status == 0, result.errors
    assert "with the mask, not with the cache of SeparatorAttention.cache_entries" in result.errors
    # 0 is as good a setting as another
    assert json.loads(file.read_text())["options"]["seed"] == 0
