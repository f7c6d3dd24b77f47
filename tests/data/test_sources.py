from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from seqeff.checks import ConfigError, UserError
from seqeff.data.document import Document, Source
from seqeff.data.sources import HuggingFaceDataset, JsonlFiles, Mixture, ParquetFiles, TextFiles


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def dataset_folder(folder, records):
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", records)
    return str(folder)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()


def test_text_files_are_sorted_once_each_and_lose_their_mark(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffÆ\r\n".encode())
    (tmp_path / "sub" / "a.txt").write_text("a")
    source = TextFiles(paths=(f"{tmp_path}/**/*.txt", str(tmp_path / "b.txt")))
    assert list(source.documents()) == [Document("Æ\r\n"), Document("a")]


@pytest.mark.parametrize("kind", [JsonlFiles, ParquetFiles, HuggingFaceDataset])
def test_tables_yield_text_or_prompt_and_completion(tmp_path, kind):
    columns = {"text": ["x", "ÿ\n"], "question": ["q1", "q2"], "answer": ["", "a2"]}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if kind is JsonlFiles:
        write_jsonl(tmp_path / "a.jsonl", records)
        where = {"paths": (str(tmp_path / "*.jsonl"),)}
    elif kind is ParquetFiles:
        write_parquet(tmp_path / "a.parquet", columns)
        where = {"paths": (str(tmp_path / "*.parquet"),)}
    else:
        where = {"name": dataset_folder(tmp_path / "set", records)}
    plain = kind(**where)
    pairs = kind(**where, prompt="question", completion="answer")
    assert list(plain.documents()) == [Document("x"), Document("ÿ\n")]
    assert list(pairs.documents()) == [Document("", "q1"), Document("a2", "q2")]
    assert plain.fingerprint() == kind(**where).fingerprint() != pairs.fingerprint()
    json.dumps(plain.fingerprint())


def test_a_saved_dataset_is_read_with_its_splits(tmp_path):
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "many"))
    for name in ("one", "many"):
        source = HuggingFaceDataset(name=str(tmp_path / name))
        assert [document.text for document in source.documents()] == ["a", "b"]
    with pytest.raises(UserError, match=r"splits 'train'; did you mean 'train'"):
        HuggingFaceDataset(name=str(tmp_path / "many"), split="trian").fingerprint()


def test_a_changed_file_changes_the_fingerprint(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = TextFiles(paths=[str(path)])
    before = source.fingerprint()
    assert source.fingerprint() == before
    path.write_text("ab")
    assert source.fingerprint() != before


def test_mixtures_nest_and_read_in_turns(counting_source):
    one, two, three = (counting_source([name * 2, name]) for name in "abc")
    inner = Mixture(sources=(two, three), weights=(1, 3))
    mixture = Mixture(sources=[one, inner], weights=[1.0, 1.0])
    assert mixture.components() == [(one, 0.5), (two, 0.125), (three, 0.375)]
    texts = [document.text for document in mixture.documents()]
    assert sorted(texts) == ["a", "aa", "b", "bb", "c", "cc"]
    assert texts[:2] == ["aa", "bb"]
    assert isinstance(mixture, Source)


def jsonl(tmp_path, content: bytes, **columns):
    (tmp_path / "a.jsonl").write_bytes(content)
    return JsonlFiles(paths=(str(tmp_path / "a.jsonl"),), **columns)


def parquet(tmp_path, columns, **names):
    write_parquet(tmp_path / "a.parquet", columns)
    return ParquetFiles(paths=(str(tmp_path / "a.parquet"),), **names)


def text(tmp_path, content: bytes):
    (tmp_path / "a.txt").write_bytes(content)
    return TextFiles(paths=(str(tmp_path / "a.txt"),))


def broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    return ParquetFiles(paths=(str(tmp_path / "a.parquet"),))


BAD = {
    "not UTF-8": (
        lambda p: text(p, b"ok \xff"),
        r"a\.txt is not UTF-8 \(byte 3 is 0xff\)",
    ),
    "no match": (lambda p: TextFiles(paths=(f"{p}/*.txt",)), r"\*\.txt' matches no file"),
    "misspelt file": (
        lambda p: text(p, b"x") and TextFiles(paths=(f"{p}/a.text",)),
        r"no such file; did you mean 'a\.txt'",
    ),
    "directory": (lambda p: TextFiles(paths=(str(p),)), r"is a directory; give a pattern such as"),
    "bad JSON": (
        lambda p: jsonl(p, b'{"text": "a"}\n\n{"text": \n'),
        r"a\.jsonl:3 is not valid JSON",
    ),
    "JSON not UTF-8": (lambda p: jsonl(p, b'{"text": "\xff"}'), r"a\.jsonl:1 is not UTF-8"),
    "JSON list": (lambda p: jsonl(p, b'["a"]'), r"a\.jsonl:1 holds a value of type list"),
    "JSON null": (lambda p: jsonl(p, b'{"text": null}'), r"a\.jsonl:1: column 'text' holds null"),
    "surrogate": (lambda p: jsonl(p, rb'{"text": "a\ud800"}'), r"a\.jsonl:1.*lone surrogate"),
    "JSON column": (
        lambda p: jsonl(p, b'{"texts": "a", "id": 1}'),
        r"no column 'text'; its columns are 'texts', 'id'; did you mean 'texts'",
    ),
    "Parquet column": (
        lambda p: parquet(p, {"content": ["a"]}, text="contents"),
        r"a\.parquet has no column 'contents'; its columns are 'content'; did you mean 'content'",
    ),
    "Parquet number": (
        lambda p: parquet(p, {"text": [1, 2]}),
        r"a\.parquet row 0: column 'text' holds a value of type int, not a string",
    ),
    "not Parquet": (broken_parquet, r"cannot read .*a\.parquet as Parquet"),
    "dataset column": (
        lambda p: HuggingFaceDataset(
            name=dataset_folder(p / "set", [{"body": "a"}]), prompt="bodi", completion="body"
        ),
        r"no column 'bodi'; its columns are 'body'; did you mean 'body'",
    ),
    "dataset split": (
        lambda p: HuggingFaceDataset(name=dataset_folder(p / "set", [{"text": "a"}]), split="dev"),
        r"split 'dev'\) cannot be loaded: Unknown split",
    ),
    "no dataset": (
        lambda p: HuggingFaceDataset(name=str(p / "missing")),
        r"missing' .* cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(tmp_path, case):
    make, message = BAD[case]
    source = make(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        list(source.documents())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextFiles(paths=()), r"TextFiles\.paths is empty"),
        (lambda: TextFiles(paths="a.txt"), r"TextFiles\.paths = 'a\.txt' is of type str"),
        (
            lambda: JsonlFiles(paths=("a",), prompt="q"),
            r"JsonlFiles\.completion is null; give both",
        ),
        (lambda: Mixture(sources=(), weights=()), r"Mixture\.sources is empty"),
        (
            lambda: Mixture(sources=(TextFiles(paths=("a",)),), weights=(1.0, 2.0)),
            r"has 2 entries for 1 sources",
        ),
        (
            lambda: Mixture(sources=(TextFiles(paths=("a",)),), weights=(0.0,)),
            r"every weight must be positive",
        ),
    ],
)
def test_bad_configs_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_dataset_that_needs_a_script_is_a_user_error(tmp_path, monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="cannot be loaded: Dataset scripts are no longer"):
        HuggingFaceDataset(name=str(tmp_path / "scripted")).fingerprint()
