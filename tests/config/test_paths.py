"""Paths in gin files."""

import os

from gin_files import loaded, message, with_base, write

from seqeff import config
from seqeff.paths import path_fields

CORPUS = """
    Train.corpus = @Corpus()
    Corpus.patterns = ('text/*.txt', '/there/a.txt', '../b.txt')
    Corpus.file = '~/tokenizer.json'
"""


def test_a_relative_path_begins_at_the_file_that_names_it(folder, monkeypatch):
    write(folder / "project/data/corpus.gin", CORPUS)
    write(folder / "project/run.gin", "include '../base.gin'\ninclude 'data/corpus.gin'\n")
    monkeypatch.setenv("HOME", "/home/somebody")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    found = config.load("../project/run.gin")
    data = folder / "project/data"
    assert found.root.corpus.patterns == (
        f"{data}/text/*.txt",
        "/there/a.txt",
        f"{folder}/project/b.txt",
    )
    assert found.root.corpus.file == "/home/somebody/tokenizer.json"
    monkeypatch.chdir("/")
    again = config.load(folder / "project/run.gin").root.corpus
    assert again.patterns == found.root.corpus.patterns
    assert found.root.corpus.notes == f"{folder}/elsewhere/notes.txt"
    assert again.notes == "/notes.txt"


def test_the_operative_config_means_the_same_files_anywhere(folder, monkeypatch):
    found = loaded(with_base(CORPUS))
    assert f"{folder}/text/*.txt" in found.operative
    operative = write(folder / "far/operative.gin", found.operative)
    monkeypatch.chdir("/")
    again = config.load(operative)
    assert again.root == found.root
    assert again.operative == found.operative


def test_a_path_in_an_override_begins_at_the_working_directory(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    overrides = ["Train.corpus=@Corpus()", "Corpus.patterns=[a.txt]", "Corpus.file=b"]
    corpus = config.load("../base.gin", overrides).root.corpus
    assert corpus.patterns == (f"{folder}/elsewhere/a.txt",)
    assert corpus.file == f"{folder}/elsewhere/b"


def test_a_macros_path_begins_where_the_macro_is_written(folder):
    write(folder / "data/where.gin", "ONE = 'one.txt'\nBOTH = (%ONE, 'two.txt')\n")
    found = loaded(
        with_base("""
        include 'data/where.gin'
        Train.corpus = @Corpus()
        Corpus.patterns = %BOTH
        Corpus.file = %ONE
        Train.note = %ONE
        """)
    )
    assert found.root.corpus.patterns == (f"{folder}/data/one.txt", f"{folder}/data/two.txt")
    assert found.root.corpus.file == f"{folder}/data/one.txt"
    assert found.root.note == "one.txt"
    assert config.load(write(folder / "far/x.gin", found.operative)).root == found.root


def test_a_macro_that_contains_itself():
    text = "ROUND = (%ROUND,)\nTrain.corpus = @Corpus()\nCorpus.patterns = %ROUND"
    assert "contains itself" in message(with_base(text))


def test_a_name_is_a_path_only_if_something_is_there(folder):
    text = with_base("Train.corpus = @Corpus()\nCorpus.dataset = 'saved'")
    assert loaded(text).root.corpus.dataset == "saved"
    (folder / "saved").mkdir()
    assert loaded(text).root.corpus.dataset == f"{folder}/saved"


def test_a_folder_whose_name_looks_like_a_pattern(folder):
    target = write(folder / "odd[1]/a.txt", "")
    gin_file = write(folder / "odd[1]/x.gin", f"include '../base.gin'\n{CORPUS}")
    corpus = config.load(gin_file, ["Corpus.file=a"]).root.corpus
    assert corpus.patterns[0] == f"{folder}/odd[[]1]/text/*.txt"
    named = config.load(gin_file, [f"Corpus.file={target}"]).root.corpus
    assert named.file == str(target)
    assert os.path.exists(named.file)


def test_values_that_are_no_paths_are_left_to_the_type_check():
    wrong = loaded(with_base("Train.corpus = @Corpus()\nCorpus.file = None")).root.corpus
    assert wrong.file is None
    line = message(with_base("Train.corpus = @Corpus()\nCorpus.patterns = (3,)"))
    assert "Corpus.patterns = (3,) is of type tuple" in line


def test_the_fields_of_the_data_package():
    from seqeff.data import Data, HuggingFaceDataset, JsonlFiles, TokenizerFile

    assert list(path_fields(Data)) == ["cache"]
    assert list(path_fields(JsonlFiles)) == ["paths"]
    assert list(path_fields(HuggingFaceDataset)) == ["name"]
    assert list(path_fields(TokenizerFile)) == ["path"]
