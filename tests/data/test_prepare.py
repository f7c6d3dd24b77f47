from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from seqeff.bench.data import benchmark_batches
from seqeff.checks import ConfigError, UserError
from seqeff.data import (
    Data,
    JsonlFiles,
    Mixture,
    TextFiles,
    TokenizerFile,
    TrainBPE,
    prepare,
    prepare_validation,
)

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "naïve.\n"]


def corpus(folder, documents, seed=0):
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for index in range(documents):
        text = " ".join(generator.choice(WORDS, generator.integers(5, 60)))
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return TextFiles(paths=(f"{folder}/*.txt",))


def config(tmp_path, source, **changes):
    settings = {
        "source": source,
        "tokenizer": TrainBPE(vocabulary_size=280),
        "sequence_length": 16,
        "batch_size": 4,
        "holdout": 0.1,
        "cache": str(tmp_path / "cache"),
    }
    return Data(**{**settings, **changes})


def decoded(prepared, batches, steps):
    rows = [row for step in range(steps) for row in batches(step).tokens]
    return "".join(prepared.tokenizer.decode(row) for row in rows)


def validation_text(prepared):
    return decoded(prepared, prepared.validation, len(prepared.validation))


def test_a_corpus_becomes_batches(tmp_path):
    source = corpus(tmp_path / "text", 40)
    data = config(tmp_path, source)
    prepared = prepare(data)
    texts = [document.text for document in source.documents()]
    held_out = validation_text(prepared)
    assert 0 < sum(text in held_out for text in texts) < 20
    assert sum(store.part.documents for store in prepared.train_stores) == sum(
        text not in held_out for text in texts
    )
    assert prepared.train(0).tokens.shape == (4, 16)
    assert prepared.train(0).tokens.max() < prepared.tokenizer.vocabulary_size <= 280
    again = prepare(data, prepared.tokenizer, prepared.fingerprint)
    np.testing.assert_array_equal(again.train(7).tokens, prepared.train(7).tokens)


def test_the_tokenizer_does_not_see_what_is_held_out(tmp_path):
    source = corpus(tmp_path / "text", 40)
    data = config(tmp_path, source, holdout=0.3)
    prepared = prepare(data)
    train = [
        document.text
        for document in source.documents()
        if document.text not in validation_text(prepared)
    ]
    assert prepared.tokenizer.fingerprint == data.tokenizer._train(train).fingerprint


def test_validation_may_have_its_own_source(tmp_path):
    source, validation = corpus(tmp_path / "train", 9), corpus(tmp_path / "validation", 3, seed=1)
    prepared = prepare(config(tmp_path, source, validation=validation))
    assert validation_text(prepared) == "".join(d.text for d in validation.documents())
    assert prepared.train_stores[0].part.documents == 9
    assert prepare(config(tmp_path, source, holdout=0.0)).validation is None


def test_validation_alone_needs_no_training_documents(tmp_path):
    source, validation = corpus(tmp_path / "train", 9), corpus(tmp_path / "validation", 3, seed=1)
    data = config(tmp_path, source, validation=validation)
    prepared = prepare(data)
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(prepared.train_stores[0].directory)
    alone = prepare_validation(data, prepared.tokenizer, prepared.fingerprint)
    assert_same_batches(alone, prepared.validation)
    (tmp_path / "validation" / "000.txt").write_text("something else")
    with pytest.raises(UserError, match="the validation documents differ from those that"):
        prepare_validation(data, prepared.tokenizer, prepared.fingerprint)


def test_held_out_documents_alone_are_opened(tmp_path):
    data = config(tmp_path, corpus(tmp_path / "text", 20))
    prepared = prepare(data)
    shutil.rmtree(prepared.train_stores[0].directory)
    alone = prepare_validation(data, prepared.tokenizer, prepared.fingerprint)
    assert_same_batches(alone, prepared.validation)
    other = TrainBPE(vocabulary_size=270)
    with pytest.raises(UserError, match="cannot have made the tokenizer of the run"):
        prepare_validation(
            dataclasses.replace(data, tokenizer=other), prepared.tokenizer, prepared.fingerprint
        )


def test_without_held_out_documents_nothing_is_read(tmp_path):
    data = config(tmp_path, corpus(tmp_path / "text", 20), holdout=0.0)
    prepared = prepare(data)
    shutil.rmtree(tmp_path / "text")
    assert prepare_validation(data, prepared.tokenizer, prepared.fingerprint) is None


def assert_same_batches(found, expected):
    assert len(found) == len(expected) > 0
    for step in range(len(expected)):
        for one, other in zip(found(step), expected(step), strict=True):
            np.testing.assert_array_equal(one, other)


def test_mixtures_are_prepared_source_by_source(tmp_path):
    sources = corpus(tmp_path / "one", 30), corpus(tmp_path / "two", 20, seed=1)
    mixture = Mixture(sources=sources, weights=(3.0, 1.0))
    prepared = prepare(config(tmp_path, mixture))
    assert len(prepared.train_stores) == len(prepared.validation_stores) == 2
    tokens = sum(store.part.tokens for store in prepared.validation_stores)
    batches = [prepared.validation(step) for step in range(len(prepared.validation))]
    assert sum(batch.loss_weights.sum() for batch in batches) == tokens
    assert prepared.train(0).tokens.shape == (4, 16)


def test_fine_tuning_scores_completions_and_their_end_alone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"q": "what?", "a": "that"}\n' * 5 + '{"q": "who?", "a": "you"}\n')
    source = JsonlFiles(paths=(str(path),), prompt="q", completion="a")
    data = config(tmp_path, source, packing="whole", validation=source)
    prepared = prepare(data)
    for step in range(len(prepared.validation)):
        batch = prepared.validation(step)
        scored = batch.targets[batch.loss_weights > 0]
        texts = prepared.tokenizer.decode(scored)
        assert texts.replace("that", "").replace("you", "") == ""
        assert (scored == prepared.tokenizer.end_of_text).sum() > 0


def test_another_tokenizer_or_other_documents_than_the_runs_are_refused(tmp_path):
    source = corpus(tmp_path / "text", 20)
    first = prepare(config(tmp_path, source))
    first.tokenizer.save(tmp_path)
    file = TokenizerFile(path=str(tmp_path / "tokenizer.json"))
    prepare(config(tmp_path, source, tokenizer=file), first.tokenizer, first.fingerprint)
    other = prepare(config(tmp_path, source, tokenizer=TrainBPE(vocabulary_size=270)))
    with pytest.raises(UserError, match="is not the tokenizer of the run"):
        prepare(config(tmp_path, source, tokenizer=file), other.tokenizer)
    with pytest.raises(UserError, match=r"TrainBPE\(vocabulary_size=260.* cannot have made"):
        prepare(config(tmp_path, source, tokenizer=TrainBPE(vocabulary_size=260)), other.tokenizer)
    with pytest.raises(UserError, match="the tokenizer differs from the one that the run"):
        prepare(config(tmp_path, source), other.tokenizer, first.fingerprint)
    (tmp_path / "text" / "000.txt").write_text("something else")
    with pytest.raises(UserError, match="documents differ from those that the run"):
        prepare(config(tmp_path, source), first.tokenizer, first.fingerprint)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    source = corpus(tmp_path / "text", 20)
    monkeypatch.setenv("SEQEFF_CACHE", str(tmp_path / "elsewhere"))
    prepare(config(tmp_path, source, cache=None))
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [
        "stores",
        "tokenizers",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, r"Data\.sequence_length = 0 must be at least 1"),
        ({"batch_size": 2.0}, r"Data\.batch_size = 2\.0 is of type float; give int"),
        ({"holdout": 1.0}, r"Data\.holdout = 1\.0 is a share"),
        ({"seed": -1}, r"Data\.seed = -1"),
        ({"packing": "hole"}, r"Data\.packing = 'hole' .* give 'split' or 'whole'"),
        ({"tokenizer": "gpt2"}, r"Data\.tokenizer = 'gpt2' is of type str"),
        ({"validation": "a.txt"}, r"Data\.validation = 'a\.txt' is of type str"),
    ],
)
def test_bad_configs_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, TextFiles(paths=("a",)), **changes)


def test_the_benchmark_measures_every_case():
    speeds = benchmark_batches(
        mean_document_lengths=(5, 300),
        tokens=1 << 14,
        shard_tokens=1 << 13,
        sequence_length=63,
        batch_size=3,
        steps=4,
    )
    assert [(speed.mean_document_length, speed.packing) for speed in speeds] == [
        (5, "split"),
        (5, "whole"),
        (300, "split"),
        (300, "whole"),
    ]
    assert all(speed.host_tokens_per_second > 0 for speed in speeds)
    assert all(speed.device_tokens_per_second > 0 for speed in speeds)
