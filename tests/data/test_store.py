from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tokenizers

import seqeff.data.build
from seqeff.checks import UserError
from seqeff.data.build import build_store, is_held_out
from seqeff.data.document import Document
from seqeff.data.store import TokenStore
from seqeff.data.tokenizer import Tokenizer

_TOKENISE_IN_VAIN = """
import sys, time, pathlib
import seqeff.data.build
from seqeff.data import Document, Tokenizer, build_store

seqeff.data.build._BATCH_DOCUMENTS = 1

class Source:
    def documents(self):
        for index in range(10):
            if index == 5:
                print("written", flush=True)
                time.sleep(60)
            yield Document(f"text {index}")

    def fingerprint(self):
        return {"kind": "CountingSource", "name": "killed"}

cache = pathlib.Path(sys.argv[1])
build_store(Source(), Tokenizer.load(cache / "tokenizer"), cache)
"""

_FILE_SIZE_LIMIT = """
import resource, sys, pathlib
from seqeff.checks import UserError
from seqeff.data import Document, Tokenizer, build_store

class Source:
    def documents(self):
        yield Document("many words " * 10000)

    def fingerprint(self):
        return {"kind": "large"}

cache = pathlib.Path(sys.argv[1])
tokenizer = Tokenizer.load(cache / "tokenizer")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    build_store(Source(), tokenizer, cache)
except UserError as error:
    print(error)
"""


def run(script, cache, tokenizer):
    (cache / "tokenizer").mkdir()
    tokenizer.save(cache / "tokenizer")
    return subprocess.Popen(
        [sys.executable, "-c", script, str(cache)], stdout=subprocess.PIPE, text=True
    )


def texts_of(store, tokenizer):
    return [tokenizer.decode(store.document(index)) for index in range(len(store.lengths))]


def leftovers(cache):
    return list((cache / "stores").glob(".*.partial"))


@pytest.mark.parametrize("shard_tokens", [1, 64, 1 << 20])
def test_a_store_holds_every_document(
    tmp_path, counting_source, tokenizer, text, monkeypatch, shard_tokens
):
    monkeypatch.setattr(seqeff.data.build, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr(seqeff.data.build, "_BATCH_DOCUMENTS", 2)
    source = counting_source([text, "", "a", text[::-1], "b", "a"])
    store = build_store(source, tokenizer, tmp_path).train
    assert texts_of(store, tokenizer) == [text, "a", text[::-1], "b", "a"]
    assert store.prompt_lengths is None
    assert {str(shard.dtype) for shard in store.shards} == {"uint16"}
    assert (len(store.shards) > 1) == (shard_tokens < 1000)
    assert store.part.documents == 5
    assert store.part.bytes == 2 * len(text.encode()) + 3
    assert store.part.tokens == store.lengths.sum() == sum(len(shard) - 1 for shard in store.shards)
    lengths = tokenizer.byte_lengths().inside
    assert sum(lengths[shard].sum() for shard in store.shards) == store.part.bytes
    for index, start in enumerate(store.starts):
        shard = np.searchsorted(store.shard_starts, start, side="right") - 1
        begin = start - store.shard_starts[shard]
        assert store.shards[shard][begin] == tokenizer.end_of_text
        assert store.shards[shard][begin + store.lengths[index]] == tokenizer.end_of_text


def test_documents_begin_and_end_as_the_tokenizer_says(tmp_path, counting_source, tokenizer):
    inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    inner.add_special_tokens(["<s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 300)]
    )
    llama_like = Tokenizer(inner, tokenizer.end_of_text_name)
    source = counting_source(["ab", "c"], prompts=["p", ""])
    store = build_store(source, llama_like, tmp_path).train
    end, begin = tokenizer.end_of_text, 300
    prompt, first, second = map(tokenizer.encode, ("p", "ab", "c"))
    documents = [[begin, *prompt, *first, end], [begin, *second, end]]
    assert store.begin_of_text == begin
    assert store.shards[0].tolist() == [*documents[0], *documents[1], begin]
    assert store.lengths.tolist() == list(map(len, documents))
    assert store.prompt_lengths.tolist() == [len(prompt), 0]


def test_prompts_are_kept_apart(tmp_path, counting_source, tokenizer):
    source = counting_source(["answer", "plain", ""], prompts=["question", "", "only a prompt"])
    store = build_store(source, tokenizer, tmp_path).train
    assert texts_of(store, tokenizer) == ["questionanswer", "plain", "only a prompt"]
    expected = [len(tokenizer.encode(prompt)) for prompt in source.prompts]
    assert store.prompt_lengths.tolist() == expected
    assert store.part.bytes == len("questionanswerplainonly a prompt")


def test_large_vocabularies_use_four_bytes():
    assert seqeff.data.build.token_dtype(1 << 16) == "uint16"
    assert seqeff.data.build.token_dtype((1 << 16) + 1) == "uint32"


def test_a_second_start_reads_nothing(tmp_path, counting_source, tokenizer, monkeypatch):
    source = counting_source(["one", "two"])
    first = build_store(source, tokenizer, tmp_path)
    assert source.reads == 1
    monkeypatch.setattr(tokenizer, "encode_batch", None)
    again = build_store(source, tokenizer, tmp_path)
    assert source.reads == 1
    assert again.train.part == first.train.part
    other = counting_source(["one", "two", "three"], name="other")
    with pytest.raises(TypeError):
        build_store(other, tokenizer, tmp_path)


def test_an_interrupted_build_leaves_nothing(tmp_path, counting_source, tokenizer, monkeypatch):
    monkeypatch.setattr(seqeff.data.build, "_BATCH_DOCUMENTS", 1)

    def interrupt():
        assert len(leftovers(tmp_path)) == 1
        raise KeyboardInterrupt

    source = counting_source(["one", "two", "three"], hooks={2: interrupt})
    with pytest.raises(KeyboardInterrupt):
        build_store(source, tokenizer, tmp_path)
    assert [path.name for path in (tmp_path / "stores").iterdir() if path.is_dir()] == []
    source.hooks.clear()
    store = build_store(source, tokenizer, tmp_path).train
    assert texts_of(store, tokenizer) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["killed", "another"])
def test_what_a_killed_build_left_is_not_used_but_removed(
    tmp_path, counting_source, tokenizer, name
):
    process = run(_TOKENISE_IN_VAIN, tmp_path, tokenizer)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    # a build that still runs keeps its files
    build_store(counting_source(["x"], name="meanwhile"), tokenizer, tmp_path)
    assert len(leftovers(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(leftovers(tmp_path)) == 1
    source = counting_source([f"text {index}" for index in range(10)], name=name)
    store = build_store(source, tokenizer, tmp_path).train
    assert source.reads == 1
    assert texts_of(store, tokenizer) == source.texts
    assert leftovers(tmp_path) == []


def test_concurrent_builders_share_one_build(tmp_path, counting_source, tokenizer):
    started = threading.Event()
    source = counting_source(["one", "two"], hooks={1: lambda: started.wait(1)})
    stores = []
    threads = [
        threading.Thread(
            target=lambda: stores.append(build_store(source, tokenizer, tmp_path).train)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    started.set()
    for thread in threads:
        thread.join()
    assert source.reads == 1
    assert [texts_of(store, tokenizer) for store in stores] == [["one", "two"]] * 3


@pytest.mark.parametrize("holdout", [1e-9, 0.2, 0.999999])
def test_the_holdout_parts_the_documents_by_content(tmp_path, counting_source, tokenizer, holdout):
    texts = [f"document {index % 150}" for index in range(300)]
    stores = build_store(counting_source(texts), tokenizer, tmp_path, holdout)
    train, validation = stores.train, stores.validation
    parts = [texts_of(train, tokenizer), texts_of(validation, tokenizer)]
    assert sorted(parts[0] + parts[1]) == sorted(texts)
    assert set(parts[0]).isdisjoint(parts[1])
    assert all(parts)
    if holdout == 0.2:
        assert 30 < len(parts[1]) < 90
        held_out = [text for text in texts if is_held_out(Document(text), holdout)]
        assert parts[1] == held_out
    else:
        assert len(parts[1]) == 2
    reverse = counting_source(texts[::-1], name="reversed")
    again = build_store(reverse, tokenizer, tmp_path, holdout).validation
    assert sorted(texts_of(again, tokenizer)) == sorted(parts[1])


def test_empty_and_single_corpora_are_refused(tmp_path, counting_source, tokenizer):
    for texts, holdout, message in [
        ([], 0.0, "CountingSource is empty"),
        (["", ""], 0.5, "CountingSource is empty"),
        (["a", "a"], 0.01, "has a single document, which cannot be both"),
    ]:
        with pytest.raises(UserError, match=message):
            build_store(counting_source(texts), tokenizer, tmp_path, holdout)
    assert leftovers(tmp_path) == []


def damaged_store(tmp_path, counting_source, tokenizer):
    store = build_store(counting_source(["one two", "three"]), tokenizer, tmp_path).train
    return store.directory.parent, store.directory


def truncate(path):
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda part: truncate(part / "00000.bin"), r"00000\.bin is damaged: it has \d+ bytes"),
        (lambda part: (part / "00000.bin").unlink(), r"00000\.bin is damaged: No such file"),
        (lambda part: truncate(part / "lengths.npy"), r"lengths\.npy is damaged"),
        (lambda part: np.save(part / "lengths.npy", [1, 2]), r"lengths\.npy .* do not add up"),
        (lambda part: np.save(part / "lengths.npy", [7]), r"lengths\.npy .* for 2 documents"),
        (lambda part: truncate(part.parent / "manifest.json"), r"manifest\.json is damaged"),
        (lambda part: (part.parent / "manifest.json").unlink(), r"manifest\.json is damaged"),
    ],
)
def test_damage_is_named(tmp_path, counting_source, tokenizer, damage, message):
    directory, part = damaged_store(tmp_path, counting_source, tokenizer)
    damage(part)
    with pytest.raises(UserError, match=message) as raised:
        TokenStore(directory, "train")
    assert f"delete {directory} and start again" in str(raised.value)


def test_the_manifest_counts(tmp_path, counting_source, tokenizer):
    store = build_store(counting_source(["a", "b", "c"]), tokenizer, tmp_path, 0.3).train
    manifest = json.loads((store.directory.parent / "manifest.json").read_text())
    assert manifest["tokenizer"] == tokenizer.fingerprint
    assert manifest["source"] == {"kind": "CountingSource", "name": "counting"}
    assert sum(part["documents"] for part in manifest["parts"].values()) == 3
    assert sum(part["bytes"] for part in manifest["parts"].values()) == 3


def test_a_full_disk_is_one_clear_line(tmp_path, tokenizer):
    process = run(_FILE_SIZE_LIMIT, tmp_path, tokenizer)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert "cannot write to" in output
    assert "SEQEFF_CACHE" in output
    assert leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_clear_line(
    tmp_path, counting_source, tokenizer, monkeypatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/stores: Not a directory"):
        build_store(counting_source(["a"]), tokenizer, tmp_path / "file")

    def read_only(*arguments, **settings):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        build_store(counting_source(["a"]), tokenizer, tmp_path)
