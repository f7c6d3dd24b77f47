"""Training runs on a GPU that are killed and resumed, against whole ones.

    python experiments/gpu_checks/resume.py --json experiments/gpu_checks/RESULT.json

Needs one NVIDIA GPU. Exits with status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from seqeff.runs import versions
from seqeff.training.metrics import read_metrics

_CONFIG = Path(__file__).with_name("resume.gin")
_STEPS, _KILLS = 40, 2


def check_resume(deterministic: bool) -> dict:
    """Losses of a run killed at random moments against those of one that never was."""
    overrides = [
        f"--gin.Train.steps={_STEPS}",
        f"--gin.Train.deterministic={deterministic}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        _train(whole, overrides)
        kills = 0
        generator = random.Random(0)
        for _ in range(_KILLS):
            process = _start(broken, overrides)
            target = _last_step(broken) + generator.randint(6, 16)
            while process.poll() is None and _last_step(broken) < target:
                time.sleep(0.005)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
        _train(broken, overrides)
        losses, again = (
            {
                line["step"]: line["loss"]
                for line in read_metrics(path / "metrics.jsonl")
                if "loss" in line
            }
            for path in (whole, broken)
        )
    difference = max(abs(losses[step] - again.get(step, float("inf"))) for step in losses)
    return {
        "check": "resumed run against a whole one",
        "deterministic": deterministic,
        "steps": len(losses),
        "kills": kills,
        "greatest_loss_difference": difference,
        "passed": difference == 0.0 if deterministic else difference < 0.05,
    }


def _start(directory: Path, overrides: list[str]) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "seqeff.cli",
        "train",
        str(_CONFIG),
        "--run-dir",
        str(directory),
    ]
    return subprocess.Popen(
        [*command, *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _train(directory: Path, overrides: list[str]) -> None:
    process = _start(directory, overrides)
    error = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"training failed:\n{error[-2000:]}")


def _last_step(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def main() -> int:
    """Runs all checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # the runs go first, while this process holds no memory of the device
    results = []
    for deterministic in (True, False):
        results.append(check_resume(deterministic))
        print(results[-1], flush=True)
    device = jax.devices()[0]
    report = {"device": device.device_kind, "versions": versions(), "results": results}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
