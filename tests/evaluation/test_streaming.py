"""Streams: the loss of whole texts, in memory that does not grow; stopping and going on."""

import dataclasses
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import refused, seqeff

from seqeff.checks import UserError
from seqeff.data import ByteLengths, TextFiles, Tokenizer
from seqeff.evaluation import Book, Stream, read_books, read_in_rows, stream, streaming
from seqeff.evaluation.comparison import methods, warning
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    SeparatorAttention,
    TransformerConfig,
    token_losses,
)
from seqeff.models.positions import BilevelPositions, LearnedPositions

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCABULARY, CHUNK = 31, 16
ATTENTION = SeparatorAttention(
    window=5, initial_tokens=2, separators=3, separator_ids=(3, 4, 5), positions="compact"
)
CONFIG = TransformerConfig(
    vocabulary_size=VOCABULARY,
    width=16,
    layers=2,
    projections=HeadProjections(heads=2),
    feed_forward=FeedForward(hidden=16),
    attention=ATTENTION,
    dtype="float32",
    attention_backend="reference",
)
SIZES = ByteLengths(np.arange(VOCABULARY) % 4, np.arange(VOCABULARY) % 3, begin=3)
RANDOM = np.random.default_rng(0)
BOOKS = [
    Book(str(length), RANDOM.integers(0, VOCABULARY, length).astype(np.int32))
    for length in (40, 3, 33)
]


@pytest.fixture(scope="module")
def parameters():
    return nnx.to_pure_dict(nnx.split(CONFIG.make(nnx.Rngs(0)))[1])


def with_attention(**changes):
    return dataclasses.replace(CONFIG, attention=dataclasses.replace(ATTENTION, **changes))


def losses(config, parameters, tokens):
    """Of every token but the first, from whole rows."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    model = nnx.merge(graph, parameters)
    states = model(jnp.asarray(tokens[None, :-1]))
    return np.asarray(token_losses(states, model.head(), jnp.asarray(tokens[None, 1:])))[0]


def results(config, parameters, books=BOOKS, **options):
    reader = Stream(config, SIZES, CHUNK)
    return [result for _, result in stream(reader, parameters, books, **options)]


def test_each_book_has_the_loss_of_the_whole(parameters):
    for book, found in zip(BOOKS, results(CONFIG, parameters), strict=True):
        expected = losses(CONFIG, parameters, book.tokens)
        assert found.perplexity.nats == pytest.approx(expected.sum(), rel=1e-5)
        assert found.perplexity.tokens == len(book.tokens) - 1
        assert found.perplexity.bytes == SIZES.of(book.tokens[1:], book.tokens[:-1]).sum()
        assert found.perplexity.resident <= 2 + 3 + 5


def test_a_stream_goes_on_from_book_to_book(parameters):
    whole = losses(CONFIG, parameters, np.concatenate([book.tokens for book in BOOKS]))
    first = 0
    for book, found in zip(BOOKS, results(CONFIG, parameters, carry=True), strict=True):
        last = first + len(book.tokens)
        # none from a book's last token to the next one's first
        assert found.perplexity.nats == pytest.approx(whole[first : last - 1].sum(), rel=1e-5)
        first = last


def published_entries(tokens):
    """How many entries each token attends: a list of what there is, 14 after a token at most."""
    entries, past, attended = [], 2, []
    for token in tokens:
        entries.append(token in ATTENTION.separator_ids)
        attended.append(len(entries))
        if len(entries) > 14:
            separators = entries[2:past] + [x for x in entries[past:-5] if x]
            entries = entries[:2] + separators[-3:] + entries[-5:]
            past = 2 + len(separators[-3:])
    return attended


def test_entries_are_those_of_the_published_equation(parameters):
    """Through the cache with a saw-tooth, a chunk at a time, as if one token after another."""
    published = dataclasses.replace(
        CONFIG, attention=dataclasses.replace(ATTENTION, cache_entries=14)
    )
    (found,) = results(published, parameters, BOOKS[:1])
    assert found.perplexity.resident == 14
    # every token but the last predicts one
    expected = np.mean(published_entries(BOOKS[0].tokens)[:-1])
    assert found.perplexity.entries_read == pytest.approx(expected, rel=1e-6)
    # a limit that is never reached is dense attention
    large = with_attention(cache_entries=99)
    (found,) = results(large, parameters, BOOKS[:1])
    dense = dataclasses.replace(CONFIG, attention=DenseAttention())
    expected = losses(dense, parameters, BOOKS[0].tokens)
    assert found.perplexity.nats == pytest.approx(expected.sum(), rel=1e-5)
    assert found.perplexity.entries_read == pytest.approx(20)


@pytest.mark.parametrize("carry", [False, True])
def test_a_stream_that_was_stopped_goes_on(carry, parameters, tmp_path, monkeypatch):
    state = tmp_path / "kept" / "stream.safetensors"
    expected = results(CONFIG, parameters, carry=carry)
    reader = Stream(CONFIG, SIZES, CHUNK)
    taken, take = [], reader.take

    def break_off(*arguments):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(arguments[-1])
        return take(*arguments)

    monkeypatch.setattr(reader, "take", break_off)
    options = {"carry": carry, "state": state, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        list(stream(reader, parameters, BOOKS, **options))
    monkeypatch.undo()
    resumed = []
    monkeypatch.setattr(
        reader, "take", lambda *arguments: resumed.append(arguments[-1]) or take(*arguments)
    )
    found = [result for _, result in stream(reader, parameters, BOOKS, **options)]
    # 40 tokens and 3 are done; of the last book's chunks, two are left
    assert taken == [0, 16, 32, 0] and resumed == [0, 16, 32]
    for one, other in zip(found, expected, strict=True):
        assert one.perplexity.nats == pytest.approx(other.perplexity.nats, rel=1e-6)
        assert one.perplexity.tokens == other.perplexity.tokens
    # all of it is kept
    monkeypatch.setattr(reader, "take", None)
    again = [result for _, result in stream(reader, parameters, BOOKS, **options)]
    assert again == found
    other_texts = "is of other texts, parameters or settings; remove it"
    with pytest.raises(UserError, match=other_texts):
        list(stream(reader, parameters, BOOKS[:2], **options))
    # the same tokens, cut elsewhere
    tokens = np.concatenate([book.tokens for book in BOOKS])
    cut = [Book("", tokens[:41]), Book("", tokens[41:43]), Book("", tokens[43:])]
    with pytest.raises(UserError, match=other_texts):
        list(stream(reader, parameters, cut, **options))
    # one weight that differs in its last bit, or two that changed places
    for changed in (
        parameters["embedding"].at[3, 2].set(np.nextafter(parameters["embedding"][3, 2], 9)),
        parameters["embedding"].at[:2].set(parameters["embedding"][1::-1]),
    ):
        with pytest.raises(UserError, match=other_texts):
            list(stream(reader, {**parameters, "embedding": changed}, BOOKS, **options))
    other = with_attention(window=6)
    with pytest.raises(UserError, match="another model or of other sizes; remove it"):
        list(stream(Stream(other, SIZES, CHUNK), parameters, BOOKS, **options))
    state.write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read"):
        list(stream(reader, parameters, BOOKS, **options))


def test_what_is_kept_is_not_timed(parameters, tmp_path, monkeypatch):
    save, clock, passed = streaming.save_cache, time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])

    def slow(*arguments):
        passed[0] += 1e4
        save(*arguments)

    monkeypatch.setattr(streaming, "save_cache", slow)
    options = {"state": tmp_path / "kept", "save_every": 1}
    assert sum(found.seconds for found in results(CONFIG, parameters, **options)) < 1e4


def test_a_book_of_one_token(parameters):
    one = [Book("one", np.asarray([3], np.int32))]
    for found in (
        *results(CONFIG, parameters, one),
        *(found for _, found in read_in_rows(CONFIG, parameters, SIZES, one, 10)),
    ):
        assert (found.perplexity.tokens, found.perplexity.nats) == (0, 0)


def test_texts_longer_than_the_positions(parameters):
    attention = dataclasses.replace(ATTENTION, positions="absolute")
    learned = dataclasses.replace(
        CONFIG, attention=attention, positions=LearnedPositions(length=40)
    )
    graph = learned.make(nnx.Rngs(0))
    own = nnx.to_pure_dict(nnx.split(graph)[1])
    assert len(results(learned, own)) == 3
    with pytest.raises(UserError, match=r"LearnedPositions\.length = 40 is below the row's 76"):
        results(learned, own, carry=True)


@pytest.mark.parametrize("carry", [False, True])
def test_parts_are_those_of_the_tokens(carry, parameters):
    reader = Stream(CONFIG, SIZES, CHUNK, parts=3)
    whole = losses(CONFIG, parameters, np.concatenate([book.tokens for book in BOOKS]))
    first = 0
    for book, found in stream(reader, parameters, BOOKS, carry=carry):
        count = len(book.tokens) - 1
        own = whole[first : first + count]
        first += len(book.tokens)
        if not carry:
            own = losses(CONFIG, parameters, book.tokens)
        part = np.arange(count) * 3 // count
        sizes = SIZES.of(book.tokens[1:], book.tokens[:-1])
        for index, one in enumerate(found.parts):
            assert one.nats == pytest.approx(own[part == index].sum(), rel=1e-5)
            assert one.tokens == (part == index).sum()
            assert one.bytes == sizes[part == index].sum()
    dense = dataclasses.replace(CONFIG, attention=DenseAttention())
    ((_, found),) = read_in_rows(CONFIG, parameters, SIZES, BOOKS[:1], 99, parts=2)
    own = losses(dense, parameters, BOOKS[0].tokens)
    # 39 are predicted
    assert [one.tokens for one in found.parts] == [20, 19]
    assert found.parts[1].nats == pytest.approx(own[20:].sum(), rel=1e-5)
    assert [one.resident for one in found.parts] == [20, 39]


def test_rows_predict_every_token_once(parameters):
    dense = dataclasses.replace(CONFIG, attention=DenseAttention())
    for book, found in read_in_rows(CONFIG, parameters, SIZES, BOOKS, 10):
        assert found.perplexity.tokens == len(book.tokens) - 1
        expected = sum(
            losses(dense, parameters, book.tokens[first : first + 11]).sum()
            for first in range(0, len(book.tokens) - 1, 10)
        )
        assert found.perplexity.nats == pytest.approx(expected, rel=1e-5)
        assert found.perplexity.resident == min(10, len(book.tokens) - 1)


def test_streamingllm_has_as_many_entries():
    without = ATTENTION.as_streaming_llm()
    assert (without.window, without.initial_tokens) == (8, 2)
    assert not without.might_keep
    published = dataclasses.replace(ATTENTION, cache_entries=14).as_streaming_llm()
    assert (published.window, published.cache_entries) == (12, 14)
    found = methods(CONFIG)
    assert list(found) == ["StreamingLLM", "SepLLM"]
    assert set(found["StreamingLLM"].attentions()) == {without}
    assert list(methods(found["StreamingLLM"])) == ["StreamingLLM"]
    window = DenseAttention(window=9)
    mixed = dataclasses.replace(CONFIG, attention=window, layer_attention={1: ATTENTION})
    assert methods(mixed)["StreamingLLM"].attentions() == (window, without)
    mixed = dataclasses.replace(CONFIG, layer_attention={1: window})
    assert methods(mixed)["StreamingLLM"].attentions() == (without, window)
    assert list(methods(dataclasses.replace(CONFIG, attention=window))) == ["own attention"]


def test_streams_have_their_methods_names():
    assert list(methods(CONFIG)) == ["StreamingLLM", "SepLLM"]
    fixed = with_attention(separator_ids=(), interval=4)
    assert list(methods(fixed)) == ["StreamingLLM", "FixLLM"]
    assert list(methods(with_attention(separator_ids=(), characters=""))) == ["StreamingLLM"]


def test_full_layers_are_refused():
    mixed = dataclasses.replace(CONFIG, layer_attention={1: DenseAttention()})
    with pytest.raises(UserError, match=r"cache of layer 1 \(DenseAttention\) grows with the text"):
        Stream(mixed, SIZES)
    unbounded = dataclasses.replace(
        CONFIG, attention=dataclasses.replace(ATTENTION, separators=None)
    )
    with pytest.raises(UserError, match=r"the cache of layer 0 \(SeparatorAttention\) grows"):
        Stream(unbounded, SIZES)


def test_positions_past_training_are_warned_of():
    absolute = with_attention(positions="absolute")
    assert "positions go up to 40, in training up to 32" in warning(absolute, 40, 32)
    assert not warning(absolute, 40, 40)
    assert not warning(CONFIG, 40, 32)
    assert not warning(CONFIG, 40, 10)
    assert "distances go up to 10, in training up to 9, past" in warning(CONFIG, 40, 9)
    assert "distances go up to 14" in warning(with_attention(cache_entries=14), 40, 9)
    segments = dataclasses.replace(absolute, positions=BilevelPositions(separator_ids=(3,)))
    assert "texts go up to 40 tokens, in training up to 32" in warning(segments, 40, 32)
    learned = dataclasses.replace(absolute, positions=LearnedPositions(length=64))
    assert not warning(learned, 40, 32)
    dense = dataclasses.replace(CONFIG, attention=DenseAttention())
    assert warning(dense, 40, 32).endswith(
        "in training up to 32, past which perplexity rises to hundreds"
    )
    # distances stay near
    window = dataclasses.replace(CONFIG, attention=DenseAttention(window=9))
    assert not warning(window, 40, 32)
    assert "distances go up to 9, in training up to 8" in warning(window, 40, 8)
    assert "positions go up to 40, in" in warning(with_attention(separators=None), 40, 32)
    assert not warning(
        with_attention(positions="absolute", initial_tokens=0, separator_ids=()), 40, 32
    )


BOUNDED = [
    "--gin.TransformerConfig.attention=@SeparatorAttention()",
    "--gin.SeparatorAttention.window=6",
    "--gin.SeparatorAttention.separators=4",
]


def test_the_command(finished, tiny, tmp_path):
    books = sorted((tiny.folder / "corpus").glob("*.txt"))[:3]
    file = tmp_path / "streams.json"
    command = ["eval", finished, "--streaming", *books, "--json", file, *BOUNDED]
    options = ["--carry", "--per-book", "--chunk", 16, "--state", tmp_path / "kept"]
    options += ["--positions", 2]
    result = seqeff(*command, *options)
    assert result.status == 0, result.errors
    assert "warning: positions go up to" in result.errors
    header, *lines = result.output.splitlines()
    *lines, names, first, second = lines
    assert header.split()[:2] == ["method", "perplexity"]
    streams = ["StreamingLLM", "SepLLM", "StreamingLLM, carried", "SepLLM, carried"]
    expected = ["dense, rows of 32", *streams]
    assert [line[:22].strip() for line in lines[3::4]] == expected
    assert [line[:22].strip() for line in lines[:3]] == [book.name for book in books]
    assert names[22:].split("   ")[1:] == expected
    assert first.startswith("0-50% ") and second.startswith("50-100% ")
    report = json.loads(file.read_text())
    assert (report["step"], report["options"]["chunk"], report["seeds"]) == (24, 16, {})
    assert "SeparatorAttention.separators = 4" in report["config"]
    for row in report["results"]:
        assert len(row["sha256"]) == 64
        assert row["tokens"] == sum(part["tokens"] for part in row["parts"])
    assert len(report["results"]) == 15
    assert report["complete"] is True
    by_method = {row["method"]: row for row in report["results"]}
    assert by_method["SepLLM"]["entries_resident"] <= 3 + 4 + 6
    assert by_method["StreamingLLM"]["entries_resident"] == 3 + 10
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        f"{name.replace(', ', '-')}.safetensors" for name in streams
    }
    # the streams are kept whole: their times too are those of the first run
    assert seqeff(*command, *options).status == 0
    streamed = [row for row in report["results"] if row["method"] in streams]
    again = json.loads(file.read_text())["results"]
    assert [row for row in again if row["method"] in streams] == streamed


def test_curves(finished, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    book, plot = sorted((tiny.folder / "corpus").glob("*.txt"))[0], tmp_path / "curves.png"
    options = ["--positions", 3, "--plot", plot]
    for command in (["--streaming", book, *BOUNDED], ["--batches", 1]):
        result = seqeff("eval", finished, *command, *options)
        assert result.status == 0, result.errors
        assert plot.read_bytes().startswith(b"\x89PNG") and [*tmp_path.iterdir()] == [plot]
        plot.unlink()


def test_some_methods_alone(finished, tiny, tmp_path):
    book = sorted((tiny.folder / "corpus").glob("*.txt"))[0]

    def methods_of(*options):
        result = seqeff("eval", finished, "--streaming", book, *options)
        assert result.status == 0, result.errors
        assert ("warning" in result.errors) == (options[1] != "dense")
        return [line[:22].strip() for line in result.output.splitlines()[1:]]

    # no layer needs a bound, and no position is far, where nothing is streamed
    assert methods_of("--method", "dense") == ["dense, rows of 32"]
    assert methods_of("--method", "streamingllm", *BOUNDED) == ["StreamingLLM"]
    assert methods_of("--method", "own", "--carry", *BOUNDED) == ["SepLLM", "SepLLM, carried"]
    window = [
        "--gin.TransformerConfig.attention=@DenseAttention()",
        "--gin.DenseAttention.window=8",
    ]
    line = refused("eval", finished, "--streaming", book, "--method", "streamingllm", *window)
    assert "no stream but its own, own attention; give --method own" in line


def test_texts_are_read_as_training_reads_them(finished, tmp_path):
    tokenizer = Tokenizer.load(finished / "tokenizer")
    text = "one,\r\ntwo\n\nthree\r"
    file = tmp_path / "book.txt"
    file.write_bytes(text.encode("utf-8-sig"))
    (document,) = TextFiles(paths=(str(file),)).documents()
    (book,) = read_books(tokenizer, [file])
    assert document.text == text
    assert book.tokens.tolist() == [tokenizer.end_of_text, *tokenizer.encode(text)]


def test_bad_streams_are_one_line(finished, tmp_path):
    book = tmp_path / "book.txt"
    line = refused("eval", finished, "--streaming", book)
    assert "the cache of layer 0 (DenseAttention) grows" in line
    assert "cannot read" in refused("eval", finished, "--streaming", book, *BOUNDED)
    book.write_bytes(b"caf\xe9")
    assert f"{book} is not UTF-8" in refused("eval", finished, "--streaming", book, *BOUNDED)
    line = refused("eval", finished, "--streaming", book, *BOUNDED, "--state", book)
    assert line.startswith(f"argument --state: {book} is a file; give a folder")
    book.write_text("")
    assert "is empty; leave it out" in refused("eval", finished, "--streaming", book, *BOUNDED)


@pytest.mark.parametrize("kind", ["absent", "folder", "empty", "encoding"])
def test_a_text_that_cannot_be_stops_it_before_any_work(finished, tmp_path, monkeypatch, kind):
    """Though it is the last of them."""

    def fail(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(Tokenizer, "encode", fail)
    monkeypatch.setattr("seqeff.training.restore.restore", fail)
    book, last = tmp_path / "book.txt", tmp_path / "last.txt"
    book.write_text("the cat sat")
    if kind == "folder":
        last.mkdir()
    elif kind != "absent":
        last.write_bytes(b"\xff" if kind == "encoding" else b"")
    line = refused("eval", finished, "--streaming", book, last, *BOUNDED)
    assert str(last) in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--carry"], "--carry is for --streaming BOOK...; give both"),
        (["--method", "own"], "--method is for --streaming"),
        (["--per-book"], "--per-book is for --streaming"),
        (["--chunk", 4], "--chunk is for --streaming"),
        (["--state", "kept"], "--state is for --streaming"),
        (["--streaming", "book", "--batches", 4], "--batches is not for --streaming"),
        (["--plot", "x.png"], "--plot x.png draws --positions PARTS; give both"),
    ],
)
def test_options_that_would_do_nothing(finished, no_devices, options, expected):
    assert expected in refused("eval", finished, *options)


def test_losses_that_are_no_numbers_are_told(not_finite, tmp_path):
    book, file = tmp_path / "book.txt", tmp_path / "found.json"
    book.write_text("the cat and the dog " * 9)
    for command in (["--batches", 1], ["--streaming", book, "--method", "dense"]):
        result = seqeff("eval", not_finite, *command, "--json", file)
        assert result.status == 1
        assert "seqeff: 1 of 1 losses are not finite" in result.errors
        (row,) = json.loads(file.read_text())["results"]
        assert [value for name, value in row.items() if name.endswith("loss")] == [None]
