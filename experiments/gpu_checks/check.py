"""What CI cannot check: attention backends on a GPU, and runs that resume there bit for bit.

    python experiments/gpu_checks/check.py --json experiments/gpu_checks/RESULT.json

Needs one NVIDIA GPU. Exits with status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from seqeff.runs import versions
from seqeff.training.metrics import read_metrics
from seqeff_kernels.range_attention import TokenSource, range_attention

_CONFIG = Path(__file__).with_name("resume.gin")
_STEPS, _KILLS = 40, 2


def check_cudnn(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    dtype: str,
) -> dict:
    """Relative errors of cuDNN's output, logsumexp and gradients against the float32 reference."""
    keys = jax.random.split(jax.random.key(length + head_dim), 4)
    queries = jax.random.normal(keys[0], (batch, length, heads, head_dim), dtype)
    shape = (batch, length, kv_heads, head_dim)
    entries = tuple(jax.random.normal(key, shape, dtype) for key in keys[1:3])
    cotangent = jax.random.normal(keys[3], queries.shape, dtype)

    def attend(backend: str, *inputs: jax.Array) -> tuple:
        def run(queries, key, value):
            return range_attention(
                queries, [TokenSource(key, value, window=window)], backend=backend
            )

        outputs, back = jax.vjp(run, *inputs)
        return *outputs, *back((cotangent.astype(outputs[0].dtype), jnp.zeros_like(outputs[1])))

    found = jax.jit(lambda *x: attend("cudnn", *x))(queries, *entries)
    exact = jax.jit(lambda *x: attend("reference", *x))(
        *(x.astype(jnp.float32) for x in (queries, *entries))
    )
    names = ("output", "logsumexp", "queries", "keys", "values")
    errors = {
        name: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for name, a, b in zip(names, found, exact, strict=True)
    }
    return {
        "check": "cudnn against reference",
        "shape": [batch, length, heads, kv_heads, head_dim],
        "window": window,
        "dtype": dtype,
        "relative_errors": {name: round(error, 6) for name, error in errors.items()},
        "passed": all(error < 1e-2 for error in errors.values()),
    }


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
    shapes = (
        (2, 1024, 12, 12, 64),
        (1, 1000, 8, 1, 80),
        (1, 778, 6, 2, 96),
        (2, 2048, 16, 4, 128),
        (1, 512, 4, 4, 256),
    )
    for shape, window, dtype in itertools.product(shapes, (None, 256), ("bfloat16", "float16")):
        results.append(check_cudnn(*shape, window, dtype))
        print(results[-1], flush=True)
    device = jax.devices()[0]
    report = {"device": device.device_kind, "versions": versions(), "results": results}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
