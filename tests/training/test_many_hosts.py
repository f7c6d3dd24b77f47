"""One run of two processes that share its directory, as on two hosts."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import STEPS, environment, losses_of, steps_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

PATIENCE = 300.0


def start(tiny, run_dir, *options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = environment() | {
        "XLA_FLAGS": "",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    command = [sys.executable, "-m", "seqeff.cli", "train", tiny.config, *options]
    if run_dir is not None:
        command += ["--run-dir", run_dir, "--gin.MeshConfig.data=2"]
    return [
        subprocess.Popen(
            list(map(str, command)),
            env=shared | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def finish(processes):
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def assert_finished(run_dir, finished):
    steps = [line["step"] for line in steps_of(run_dir) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses_of(run_dir), losses_of(finished), rtol=1e-4)


def test_two_hosts_have_the_losses_of_one(tiny, finished, tmp_path):
    statuses, outputs = finish(start(tiny, tmp_path / "run"))
    assert statuses == [0, 0], outputs
    assert_finished(tmp_path / "run", finished)


@pytest.mark.slow
def test_two_hosts_end_and_go_on_together(tiny, finished, tmp_path):
    run_dir = tmp_path / "run"
    processes = start(tiny, run_dir, "--gin.Train.log_every=1")
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    # one is told; both end after the same step
    os.kill(processes[1].pid, signal.SIGTERM)
    statuses, outputs = finish(processes)
    assert statuses == [0, 0], outputs
    assert "stopped after step" in outputs[0]
    assert "stopped after step" not in outputs[1]
    assert len(losses_of(run_dir)) < STEPS

    statuses, outputs = finish(start(tiny, run_dir))
    assert statuses == [0, 0], outputs
    assert_finished(run_dir, finished)


def test_they_need_a_directory_that_they_share(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statuses, outputs = finish(start(tiny, None))
    assert statuses == [2, 2]
    assert all("a run on many hosts needs --run-dir" in output for output in outputs)
