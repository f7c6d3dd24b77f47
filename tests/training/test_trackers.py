import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from seqeff.checks import ConfigError, UserError
from seqeff.training.trackers import NoTracker, Wandb

CONFIG = {"AdamW.learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def run_python(code: str, directory: Path, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(directory)],
        env=dict(os.environ) | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


TRACK = """
    import pathlib, sys
    import wandb
    from seqeff.training.trackers import Wandb

    for attempt in range(2):
        tracker = Wandb(project="ours", tags=["a"]).start(pathlib.Path(sys.argv[1]), {"A.b": 1})
        tracker.log({"validation_loss": 2.0 - attempt}, step=10 * attempt)
        print(wandb.run.id, wandb.run.project)
        tracker.finish()
    """


def test_offline_without_a_key_and_resumed_under_one_id(tmp_path: Path) -> None:
    first, second = run_python(TRACK, tmp_path).splitlines()
    assert first == second
    identifier, project = first.split()
    assert project == "ours"
    assert (tmp_path / "wandb_id").read_text().strip() == identifier
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{identifier}/run-{identifier}.wandb"))
    assert runs
    assert all(b"validation_loss" in run.read_bytes() for run in runs)


def test_a_sweep_agent_chooses_the_run(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_text("stored\n")
    environment = {
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_RUN_ID": "agentrun",
        "WANDB_PROJECT": "theirs",
        "WANDB_ENTITY": "someone",
    }
    found = run_python(TRACK, tmp_path, **environment).splitlines()
    assert found == ["agentrun theirs"] * 2
    assert (tmp_path / "wandb_id").read_text() == "agentrun\n"


def test_online_without_a_key_does_not_prompt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no API key; run `wandb login`"):
        Wandb(mode="online").start(tmp_path, CONFIG)
    with pytest.raises(UserError, match="no API key; run `wandb login`"):
        Wandb(mode="online").check()
    Wandb(mode="offline").check()


def test_the_environment_goes_before_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Wandb(mode="online").start(tmp_path, CONFIG)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert os.listdir(tmp_path) == []


def test_an_unknown_mode_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE = ofline must be one of online, offline"):
        Wandb().start(tmp_path, CONFIG)


def test_without_wandb_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Wandb().start(tmp_path, CONFIG)
    with pytest.raises(UserError, match="pip install wandb"):
        Wandb().check()


@pytest.mark.parametrize("part", ["init", "id"])
def test_a_full_disk_is_a_user_error(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    if part == "init":
        monkeypatch.setattr(wandb, "init", full)
    else:
        monkeypatch.setattr(wandb, "init", lambda **_: SimpleNamespace(id="a"))
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"cannot write wandb's files to {tmp_path}: No space"):
        Wandb().start(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == []


def test_other_processes_send_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tracker = Wandb().start(tmp_path, CONFIG)
    assert isinstance(tracker, NoTracker)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert os.listdir(tmp_path) == []


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match=r"Wandb.mode = 'onlin'"):
        Wandb(mode="onlin")
