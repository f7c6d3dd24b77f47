"""`seqeff eval --retrieval`: its table, its files, and what it refuses."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny_run import refused, seqeff

from seqeff.checks import UserError
from seqeff.config import load, split_overrides
from seqeff.data import Tokenizer
from seqeff.evaluation.retrieval import TASKS, AssociativeRecall, Passkey, Retrieval
from seqeff.evaluation.retrieval.example import fingerprint
from seqeff.evaluation.retrieval.grid import Result
from seqeff.evaluation.retrieval.plot import heat_map

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = ["--lengths", 300, "--depths", 0, 1, "--examples", 2]


def test_a_table_and_a_report(finished, tmp_path):
    file = tmp_path / "found.json"
    command = ["eval", finished, "--retrieval", "passkey", "mqar", *SMALL, "--seed", 7]
    settings = ["--gin.Train.log_every=2", "--gin.Passkey.digits=7"]
    settings.append("--gin.AssociativeRecall.pairs=4")
    command += settings
    done = seqeff(*command, "--json", file)
    assert done.status == 0, done.errors
    assert "warning: positions go up to 300, in training up to 32" in done.errors
    header, passkey, other, mqar = done.output.splitlines()
    assert header.split() == [
        "passkey",
        "length",
        "recall",
        "exact",
        "entries",
        "read",
        "recall",
        "at",
        "depth",
        "0",
        "1",
    ]
    assert other.split() == ["mqar", "length", "recall", "exact", "entries", "read"]
    assert passkey.split()[0] == mqar.split()[0] == "300"

    report = json.loads(file.read_text())
    assert report["benchmark"] == "retrieval"
    assert report["complete"] is True
    assert (report["run"], report["step"]) == (str(finished), 24)
    assert report["seeds"] == {"examples": 7}
    tokenizer = Tokenizer.load(finished / "tokenizer")
    assert report["tokenizer"] == tokenizer.fingerprint
    assert [f"--gin.{override}" for override in report["overrides"][-3:]] == settings
    # its config is all that it takes to ask again
    kept = tmp_path / "again.gin"
    kept.write_text(report["config"])
    (retrieval,) = load(kept, others=["Retrieval"]).others
    tasks = {"passkey": Passkey(digits=7), "mqar": AssociativeRecall(pairs=4)}
    assert retrieval == Retrieval(
        tasks=tasks, lengths=(300,), depths=(0.0, 1.0), examples=2, seed=7
    )
    cells = {(cell.task, cell.depth): cell for cell in retrieval.cells(tokenizer, 32)}
    assert len(report["results"]) == len(cells) == 3
    for found in report["results"]:
        result = Result(**found)
        cell = cells.pop((result.task, result.depth))
        assert result.length == cell.length == 300
        assert result.sha256 == fingerprint(cell.examples)
        assert result.questions == (2 if cell.task == "passkey" else 8)
        assert 0 <= result.exact <= result.recall <= 1
        assert 0 < result.entries_read <= result.entries_resident <= 300
    first = report["results"]
    assert seqeff(*command, "--json", file).output == done.output
    for one, again in zip(first, json.loads(file.read_text())["results"], strict=True):
        assert one | {"seconds": 0} == again | {"seconds": 0}


def test_one_task_with_several_settings(finished):
    """As the README has it."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (command,) = re.findall(r"`seqeff eval DIR --retrieval mqar (--gin[^`]*)`", text)
    overrides, rest = split_overrides(shlex.split(command))
    found = load(finished / "operative_config.gin", overrides, others=["Retrieval"])
    tasks = {"mqar-8": AssociativeRecall(), "mqar-64": AssociativeRecall(pairs=64)}
    assert found.others == (Retrieval(tasks=tasks),) and not rest


def test_tasks_at_the_length_of_the_run(finished):
    """Bounded separators read any length; the tokenizer is a real one."""
    bounded = [
        "--gin.TransformerConfig.attention=@SeparatorAttention()",
        "--gin.SeparatorAttention.window=9",
        "--gin.SeparatorAttention.separators=3",
        "--gin.SeparatorAttention.positions=compact",
        "--gin.Data.sequence_length=1000",
    ]
    names = ["needle", "niah-multiquery", "variable-tracking", "frequent-words", "key-value"]
    options = ["--depths", 0.5, "--examples", 1, "--slots", 4, *bounded]
    done = seqeff("eval", finished, "--retrieval", *names, *options)
    assert done.status == 0, done.errors
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines[::2]] == names
    assert {line.split()[0] for line in lines[1::2]} == {"1,000"}


def test_tokens_are_those_of_the_text(finished):
    """A question's begin where the tokenizer would cut the whole text."""
    tokenizer = Tokenizer.load(finished / "tokenizer")
    tasks = {name: task() for name, task in TASKS.items()}
    grid = Retrieval(tasks=tasks, lengths=[3000], depths=[0.5], examples=1)
    for cell in grid.cells(tokenizer, 32):
        for example in cell.examples:
            for question in getattr(example, "questions", ()):
                whole = [*example.context, *question.tokens]
                assert whole[1:] == tokenizer.encode(tokenizer.decode(whole))
                assert 2900 < len(whole) + question.wanted <= 3000


def test_a_heat_map(finished, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "found.png"
    command = ["eval", finished, "--retrieval", "passkey", *SMALL, "--plot", plot]
    done = seqeff(*command)
    assert done.status == 0, done.errors
    assert plot.read_bytes().startswith(b"\x89PNG") and [*tmp_path.iterdir()] == [plot]


def test_a_heat_map_that_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "x.png"
    file.mkdir()
    result = Result("mqar", 9, None, 1, 1, 0.5, 0.5, "", 1.0, 1, 0.1)
    with pytest.raises(UserError, match=r"cannot write .*x\.png: Is a directory"):
        heat_map([result], file)
    assert [*tmp_path.iterdir()] == [file]


def test_without_matplotlib(finished, tmp_path, monkeypatch, no_devices):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["eval", finished, "--retrieval", "passkey", "--plot", tmp_path / "x.png"]
    assert "--plot needs matplotlib: pip install 'seqeff[plot]'" in refused(*command)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--retrieval", "paskey"], "--retrieval paskey: no such task; did you mean 'passkey'?"),
        (["--retrieval", "passkey"], "passkey: 32 tokens are too few: the shortest prompt"),
        (["--retrieval", "mqar", "--lengths", 0], "--lengths: '0' is not a whole number"),
        (["--retrieval", "needle", "--depths", 1.5], "--depths: '1.5' is not a number from 0 to 1"),
        (
            ["--retrieval", "needle", "--depths", "nan"],
            "--depths: 'nan' is not a number from 0 to 1",
        ),
        (["--retrieval", "needle", "--examples", 0], "--examples: '0' is not a whole number"),
        (["--retrieval", "needle", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--retrieval", "needle", "--filler", "absent"], "/absent: No such file"),
        (["--retrieval", "needle", "--filler", "empty"], "/empty has no words"),
        (["--retrieval", "needle", "--filler", "latin"], "/latin is not UTF-8"),
        (
            ["--retrieval", "mqar", "--filler", "latin"],
            "Filler.path is never used: no Filler is built",
        ),
        (["--retrieval", "mqar", "--gin.Needle.filler=null"], "no Needle is built"),
        (["--retrieval", "mqar", "--gin.AssociativeRecall.pair=2"], "did you mean pairs?"),
        (
            ["--retrieval", "mqar", "--json", "no/x.json"],
            "--json: no/x.json: there is no folder no",
        ),
        (["--retrieval", "mqar", "--plot", "no/x.png"], "--plot: no/x.png: there is no folder no"),
        (["--retrieval", "mqar", "--plot", "x.pdf"], "--plot x.pdf is not called .png"),
        (["--retrieval", "mqar", "--batches", 1], "--batches is not for --retrieval"),
        (["--retrieval", "mqar", "--carry"], "--carry is for --streaming BOOK...; give both"),
        (["--retrieval", "mqar", "--streaming", "b"], "--streaming and --retrieval are two"),
        (["--seed", 0], "--seed is for --retrieval TASK... or --harness TASK...; give"),
        (["--lengths", 9], "--lengths is for --retrieval TASK...; give both"),
    ],
)
def test_what_is_refused(finished, tmp_path, monkeypatch, no_devices, options, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    before = sorted(tmp_path.iterdir())
    assert expected in refused("eval", finished, *options)
    assert sorted(tmp_path.iterdir()) == before


def test_positions_that_end(finished, no_devices):
    options = ["--gin.TransformerConfig.positions=@LearnedPositions()"]
    options += ["--gin.LearnedPositions.length=64", "--retrieval", "mqar", "--lengths", 65]
    assert "LearnedPositions.length = 64 is below the row's 65" in refused(
        "eval", finished, *options
    )
