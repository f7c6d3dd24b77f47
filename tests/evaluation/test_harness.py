"""`seqeff eval --harness`: its table, its report, and what it refuses; all without torch."""

import json
import math
import sys
import types

import numpy as np
import pytest
from chat_templates import STRICT
from harness_tasks import TASKS, harness_model, local_tasks, write_tasks  # noqa: F401
from tiny_run import refused, seqeff

from seqeff.checks import UserError
from seqeff.data import ChatTemplate, Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation", "local_tasks")

lm_eval = pytest.importorskip("lm_eval", reason="needs the harness extra")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def test_a_table_and_a_report(finished, tasks, tmp_path):
    file = tmp_path / "found.json"
    command = ["eval", finished, "--harness", "local_*", "--include-path", tasks, "--limit", 5]
    done = seqeff(*command, "--shots", 1, "--seed", 7, "--json", file)
    assert done.status == 0, done.errors
    assert "texts are longer than the context of 32" in done.errors
    lines = done.output.splitlines()
    assert lines[0].split("|")[1].strip() == "Tasks"
    named = [line.split("|")[1].strip() for line in lines[2:]]
    assert set(filter(None, named)) == set(TASKS)

    report = json.loads(file.read_text())
    assert report["benchmark"] == "harness"
    assert report["versions"]["packages"]["lm_eval"] == lm_eval.__version__
    assert (report["run"], report["step"]) == (str(finished), 24)
    assert (report["limit"], report["context"]) == (5, 32)
    assert report["seeds"] == {"random": 7, "numpy": 7, "shots": 7, "sampling": 7}
    assert "TransformerConfig.attention" in report["config"]
    assert report["tokenizer"] == Tokenizer.load(finished / "tokenizer").fingerprint
    rows = {row["task"]: row for row in report["results"]}
    assert set(rows) == set(TASKS)
    for row in rows.values():
        assert (row["version"], row["shots"], row["documents"]) == (2.0, 1, 5)
        assert len(row["sha256"]) == 64
    assert 0 <= rows["local_choice"]["metrics"]["acc,none"] <= 1
    assert rows["local_word"]["metrics"]["perplexity,none"] > 1
    assert rows["local_word"]["config"]["output_type"] == "loglikelihood"

    # a request's answer does not depend on the others
    assert seqeff(*command, "--shots", 1, "--seed", 7, "--json", file, "--slots", 3).status == 0
    for again in json.loads(file.read_text())["results"]:
        row = rows[again["task"]]
        assert again["sha256"] == row["sha256"]
        for name, value in row["metrics"].items():
            same = value if value is None else pytest.approx(value, rel=1e-5)
            assert again["metrics"][name] == same
    assert (
        seqeff(*command[:-2], "--harness", tasks / "local_choice.yaml", "--json", file).status == 0
    )
    (row,) = json.loads(file.read_text())["results"]
    assert (row["documents"], row["shots"]) == (9, 0)
    assert row["sha256"] != rows["local_choice"]["sha256"]


def test_generation(finished):
    """Requests are drawn by seeds of their own; what the engine does not have is refused."""
    model = harness_model(finished)

    def written(*settings):
        return model.generate_until(
            [
                types.SimpleNamespace(args=("the cat sat", {"max_gen_toks": 9, **one}))
                for one in settings
            ]
        )

    hot = {"temperature": 9.0}
    neutral = {"num_beams": 1, "early_stopping": False, "min_p": None}
    greedy, same, top, first, second, third = written(
        neutral,
        {"do_sample": False, "temperature": 0.7, "top_k": 0},
        {"do_sample": True, "top_k": 1, **hot},
        # all of the tokens, as transformers writes it
        {"do_sample": True, "top_k": 0, **hot},
        hot,
        hot,
    )
    assert greedy == same == top
    assert len({greedy, first, second, third}) == 4
    stop = second[3]
    again = written({}, {}, {}, hot, hot | {"until": stop}, hot)
    assert again == [greedy, greedy, greedy, first, second[: second.index(stop)], third]
    assert written() == []
    assert written({"top_k": 0, **hot}) == written({"top_k": None, **hot}) == written(hot)
    assert written({"top_k": 2, **hot}) != written(hot)
    with pytest.raises(UserError, match="a task asks to generate with num_beams = 10, which"):
        written({"num_beams": 10})
    with pytest.raises(UserError, match="generates up to 32 tokens, which leaves no room"):
        written({"max_gen_toks": 32})


def test_without_the_harness(finished, tasks, monkeypatch, no_devices):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused("eval", finished, "--harness", "local_text", "--include-path", tasks)
    assert line == "--harness needs lm-evaluation-harness: pip install 'seqeff[harness]'"


def test_a_continuation_beyond_the_context(finished):
    request = types.SimpleNamespace(args=("a", " the cat" * 40))
    with pytest.raises(UserError, match="tokens, more than the context of 32; --context gives"):
        harness_model(finished).loglikelihood([request])


def test_the_tasks_of_the_harness(finished, monkeypatch, no_devices):
    """Their data are not here."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lm_eval.tasks.TaskManager.func)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("eval", finished, "--harness", "hellaswag")
    assert line.startswith("--harness: Couldn't reach 'Rowan/hellaswag' on the Hub")
    assert "downloaded once: see to the network, or give tasks of local files" in line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--harness", "locl_text"], "--harness locl_text: no such task; did you mean 'local_text"),
        (["--harness", "damaged.yaml"], "a task cannot be loaded: ParserError: while parsing"),
        (["--harness", "absent.yaml"], "cannot be loaded: FileNotFoundError: Unable to find"),
        (["--harness", "column.yaml"], "cannot be loaded: UndefinedError: 'body' is undefined"),
        (["--harness", "unsafe.yaml"], "--harness unsafe: this task runs code that the model"),
        (["--harness", "local_text", "--include-path", "no"], "--include-path no: no such folder"),
        (["--harness", "local_text", "--json", "no/x.json"], "--json: no/x.json: there is no f"),
        (["--harness", "local_text", "--shots", -1], "--shots -1 must not be negative"),
        (["--harness", "local_text", "--seed", 2**32], "--seed 4294967296 must be at least 0, be"),
        (["--harness", "local_text", "--limit", 0], "--limit: '0' is not a whole number"),
        (["--harness", "local_text", "--lengths", 9], "--lengths is for --retrieval TASK...; give"),
        (
            ["--harness", "local_text", "--batches", 1],
            "--batches is not for --harness; leave one out",
        ),
        (["--harness", "x", "--retrieval", "mqar"], "--retrieval and --harness are two commands"),
        (["--limit", 1], "--limit is for --harness TASK...; give both"),
    ],
)
def test_what_is_refused(finished, tasks, tmp_path, monkeypatch, no_devices, options, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.yaml").write_text("task: [a")
    own = (tasks / "local_text.yaml").read_text()
    absent = own.replace("data.jsonl", "absent.jsonl")
    (tmp_path / "absent.yaml").write_text(absent)
    (tmp_path / "column.yaml").write_text(own.replace("{{text}}", "{{body}}"))
    unsafe = own.replace("task: local_text", "task: unsafe\nunsafe_code: true")
    (tmp_path / "unsafe.yaml").write_text(unsafe)
    before = sorted(tmp_path.iterdir())
    if "--include-path" not in options and "--harness" in options:
        options = [*options, "--include-path", tasks]
    assert expected in refused("eval", finished, *options)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("num_beams: 4", "a task asks to generate with num_beams = 4, which is not here"),
        ("guidance_scale: 1.5", "to generate with guidance_scale = 1.5, which is not here"),
        ("max_gen_toks: 32", "a task generates up to 32 tokens, which leaves no room for a prompt"),
        ("max_gen_toks: many", "invalid literal for int() with base 10: 'many'"),
        ("top_p: 2, max_gen_toks: 9", "Sampling.top_p = 2 must be above 0"),
        ("top_k: -1, max_gen_toks: 9", "Sampling.top_k = -1 must be at least 1"),
    ],
)
def test_generation_that_is_not_here_is_refused_before_any_work(
    finished, tasks, tmp_path, no_devices, settings, expected
):
    """With a task that scores before it, as its scores would be lost."""
    own = (tasks / "local_answer.yaml").read_text().replace("max_gen_toks: 13", settings)
    file = tmp_path / "beams.yaml"
    file.write_text(own.replace("task: local_answer", "task: own"))
    line = refused("eval", finished, "--harness", tasks / "local_text.yaml", file)
    assert line.startswith("--harness own: ")
    assert expected in line


def test_what_is_not_finite_is_told(finished, capsys):
    model = harness_model(finished)
    asked = [types.SimpleNamespace(args=("the cat", text)) for text in (" sat", " ran")]
    assert all(map(math.isfinite, (chance for chance, _ in model.loglikelihood(asked))))
    assert "not finite" not in capsys.readouterr().err
    broken = harness_model(finished, change=lambda x: x * np.nan)
    assert all(math.isnan(chance) for chance, _ in broken.loglikelihood(asked))
    assert "seqeff: 2 of 2 scores are not finite: see to the run's" in capsys.readouterr().err
    settings = {"max_gen_toks": 5}
    assert broken.generate_until([types.SimpleNamespace(args=("the cat", settings))]) == [""]
    assert "seqeff: 1 of 1 continuations end early" in capsys.readouterr().err


def test_a_chat_template(copied, tasks, tmp_path, monkeypatch):
    command = ["eval", copied, "--harness", "local_choice", "local_answer", "--include-path", tasks]
    command += ["--shots", 1, "--seed", 7, "--limit", 3, "--json"]
    assert seqeff(*command, tmp_path / "plain.json").status == 0
    line = refused(*command, tmp_path / "chat.json", "--apply-chat-template")
    assert line.startswith(f"{copied / 'tokenizer'} has no chat template, neither chat_template.j")
    (copied / "tokenizer/chat_template.jinja").write_text(STRICT)
    done = seqeff(*command, tmp_path / "chat.json", "--apply-chat-template")
    assert done.status == 0, done.errors
    plain, chat = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("plain", "chat"))
    assert plain["chat_template"] is None and len(chat["chat_template"]) == 64
    for one, other in zip(plain["results"], chat["results"], strict=True):
        assert one["sha256"] != other["sha256"]
    model = harness_model(copied, ChatTemplate.load(copied / "tokenizer"))
    asked = [{"role": "user", "content": "the cat"}]
    told = [{"role": "system", "content": "a"}, *asked]
    # a template that takes no system's message goes without
    assert model.apply_chat_template(told) == model.apply_chat_template(asked)
    with pytest.raises(UserError, match="does not take messages of user, user: roles must take"):
        model.apply_chat_template(asked * 2)
    assert "--apply-chat-template is for --harness TASK" in refused(
        "eval", copied, "--apply-chat-template"
    )


def test_a_task_that_fails(finished, tasks):
    line = refused(
        "eval", finished, "--harness", "local_choice", "--include-path", tasks, "--shots", 20
    )
    assert line.startswith("--harness: a task failed: ValueError: Sample larger than population")


def test_positions_that_end(finished, tasks, no_devices):
    options = ["--gin.TransformerConfig.positions=@LearnedPositions()"]
    options += ["--gin.LearnedPositions.length=64", "--harness", "local_text"]
    line = refused("eval", finished, *options, "--include-path", tasks, "--context", 65)
    assert "LearnedPositions.length = 64 is below the row's 65" in line
