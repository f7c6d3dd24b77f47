"""Runs that are killed, ended, or refused, and go on."""

import os
import random
import shutil
import signal
import threading
import time

import pytest
from tiny_run import (
    EVALUATE_EVERY,
    SAVE_EVERY,
    STEPS,
    files_of,
    losses_of,
    refused,
    steps_of,
)

from seqeff.runs import RunDirectory

pytestmark = pytest.mark.usefixtures("quick_compilation")

PATIENCE = 120.0


def lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


class EndedError(Exception):
    """A process ended, with this status, before it could be killed."""


def kill(process, when):
    """Kills a process at the moment that a condition holds; `EndedError` if it ends before."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not when():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    status = process.wait()
    if status != -signal.SIGKILL:
        raise EndedError(status)


def finish(tiny, run_dir):
    process = tiny.start(run_dir)
    assert process.wait(PATIENCE) == 0, (tiny.folder / f"{run_dir.name}.log").read_text()


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def test_a_run_killed_again_and_again_has_the_losses_of_one_that_never_was(tiny, finished):
    run_dir = tiny.folder / "killed"
    run = RunDirectory(run_dir)
    choose = random.Random(0)

    def line(number):
        return lambda: lines(run_dir) >= number

    # while the step compiles
    kill(tiny.start(run_dir), run.exists)
    assert lines(run_dir) == 0
    # while the first checkpoint is written, or just after
    kill(tiny.start(run_dir), lambda: any(run.checkpoints.glob(f"*{SAVE_EVERY}")))
    # while the first evaluation runs
    kill(tiny.start(run_dir), line(EVALUATE_EVERY))
    for number in sorted(choose.sample(range(EVALUATE_EVERY + 2, STEPS), 3)):
        kill(tiny.start(run_dir), line(number))
    finish(tiny, run_dir)
    assert steps_of(run_dir) == steps_of(finished)
    assert files_of(run_dir / "samples") == files_of(finished / "samples")


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tiny, finished):
    run_dir = tiny.folder / "killed20"
    choose = random.Random(1)
    begin = time.monotonic()
    finish(tiny, tiny.folder / "timed")
    duration = time.monotonic() - begin
    kills = 0
    while kills < 20:
        try:
            kill(tiny.start(run_dir), after(choose.uniform(0, duration)))
            kills += 1
        except EndedError as ended:
            assert ended.args == (0,)
            assert steps_of(run_dir) == steps_of(finished)
            shutil.rmtree(run_dir)
    finish(tiny, run_dir)
    assert steps_of(run_dir) == steps_of(finished)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_that_is_asked_to_end_saves_and_goes_on_later(number, tiny, finished, tmp_path):
    run_dir = tmp_path / "run"

    def ask():
        while lines(run_dir) < SAVE_EVERY + 2:
            time.sleep(0.0005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    thread.start()
    before = signal.getsignal(number)
    result = tiny.train(run_dir)
    thread.join()
    assert signal.getsignal(number) is before
    assert result.status == 0, result.errors
    step = len(losses_of(run_dir))
    assert SAVE_EVERY + 1 <= step < STEPS
    assert f"stopped after step {step}; go on with" in result.output
    assert (run_dir / f"checkpoints/{step}").is_dir()
    assert tiny.train(run_dir).status == 0
    assert steps_of(run_dir) == steps_of(finished)


def test_an_error_in_the_middle_leaves_no_thread_and_no_lock(tiny, finished, tmp_path, monkeypatch):
    from seqeff.training import report

    def fail(*_):
        raise RuntimeError("out of luck")

    run_dir = tmp_path / "run"
    before = set(threading.enumerate())
    with monkeypatch.context() as patched:
        patched.setattr(report.Report, "validation", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            tiny.train(run_dir)
    assert not {thread.name for thread in set(threading.enumerate()) - before} & {"seqeff-loader"}
    # the checkpoint that was being written is whole, and the run goes on
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [str(SAVE_EVERY)]
    assert tiny.train(run_dir).status == 0
    assert steps_of(run_dir) == steps_of(finished)


def test_a_second_process_in_the_same_directory_is_refused(tiny, copied):
    before = files_of(copied)
    with RunDirectory(copied).lock():
        line = refused("train", tiny.config, "--run-dir", copied, f"--gin.Train.steps={STEPS + 1}")
    assert "another process is training" in line
    assert files_of(copied) == before


def test_a_directory_whose_run_never_began_is_begun_anew(tiny, copied, finished):
    """What a kill leaves before the operative config is written is not trusted."""
    shutil.rmtree(copied / "checkpoints")
    (copied / "operative_config.gin").unlink()
    (copied / "data.json").write_text("{}")
    (copied / "tokenizer/tokenizer.json").write_text("half")
    assert tiny.train(copied).status == 0
    assert steps_of(copied) == steps_of(finished)


def test_checkpoints_without_a_config_are_not_taken_over(tiny, copied):
    (copied / "operative_config.gin").unlink()
    line = refused("train", tiny.config, "--run-dir", copied)
    assert "has checkpoints but no operative_config.gin" in line
    assert (copied / f"checkpoints/{STEPS}").is_dir()
