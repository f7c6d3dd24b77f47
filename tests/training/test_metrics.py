import json
import math
import resource
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from seqeff.checks import UserError
from seqeff.training.metrics import (
    MetricsFile,
    Throughput,
    device_memory,
    model_flops_utilisation,
    peak_flops,
    read_metrics,
)


def test_every_line_is_on_disk_at_once_and_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write(1, {"loss": jnp.float32(1.5), "count": np.int32(3), "split": "train"})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 1.5, "count": 3, "split": "train"}
    specials = {"loss": jnp.nan, "up": jnp.float32(jnp.inf), "down": -math.inf, "none": None}
    metrics.write(2, specials)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    last = read_metrics(path)[-1]
    assert math.isnan(last["loss"])
    assert (last["up"], last["down"], last["none"]) == (math.inf, -math.inf, None)
    metrics.close()


def test_lines_past_the_restored_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in range(1, 8):
        metrics.write(step, {"loss": step / 2})
        if step % 3 == 0:
            metrics.write(step, {"validation_loss": step / 4})
    metrics.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 8, "lo')
    assert len(read_metrics(path)) == 9
    resumed = MetricsFile(path)
    assert path.read_bytes() == whole
    resumed.truncate_after(6)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8])
    resumed.write(7, {"loss": 3.5})
    resumed.close()
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    fresh = MetricsFile(path)
    fresh.truncate_after(0)
    fresh.close()
    assert path.read_bytes() == b""


def test_a_file_of_only_a_cut_off_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1')
    MetricsFile(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "damage", [b'{"step": 2, "lo{"step": 3}', b"\xff\x00", b'{"st\rep', b"3", b'{"loss": 1.0}', b""]
)
def test_a_damaged_line_is_named_and_nothing_is_lost(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + damage + b'\n{"step": 4}\n'
    path.write_bytes(content + b'{"step": 5, "lo')
    metrics = MetricsFile(path)
    for read in (lambda: metrics.truncate_after(9), lambda: read_metrics(path)):
        with pytest.raises(UserError, match=rf"{path}, line 2: .*remove this line"):
            read()
    metrics.close()
    assert path.read_bytes() == content


def test_a_disk_that_fills_up_within_a_line_is_a_user_error(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write metrics to .*: File too large"):
            metrics.write(1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.close()
    MetricsFile(metrics.path).close()
    assert metrics.path.read_bytes() == b""


def test_bad_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read metrics"):
        read_metrics(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2"):
        read_metrics(tmp_path / "bad.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with open("/dev/full", "wb", buffering=0) as full:
        metrics._stream = full
        with pytest.raises(UserError, match="No space left"):
            metrics.write(1, {"loss": 1.0})


def test_throughput_leaves_out_pauses_and_old_updates() -> None:
    now = 0.0

    def clock() -> float:
        return now

    throughput = Throughput(window=3, clock=clock)
    assert throughput.tokens_per_second() == 0.0
    for step in range(6):
        now += 100.0 if step == 0 else 2.0
        throughput.update(1000)
        with throughput.pause():
            now += 50.0
    assert throughput.tokens_per_second() == pytest.approx(500.0)


def test_utilisation() -> None:
    hopper = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert peak_flops(hopper) == 989e12
    assert peak_flops(SimpleNamespace(device_kind="NVIDIA H100 PCIe")) == 756e12
    assert peak_flops(SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB")) == 312e12
    assert peak_flops(SimpleNamespace(device_kind="cpu")) is None
    assert model_flops_utilisation(989e3, 1e9, 2, hopper) == pytest.approx(0.5)
    assert model_flops_utilisation(1.0, 1.0, 1, SimpleNamespace(device_kind="cpu")) is None


def test_memory() -> None:
    statistics = {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30, "other": 1}
    device = SimpleNamespace(memory_stats=lambda: statistics)
    assert device_memory(device) == {"memory_gib": 1.0, "peak_memory_gib": 3.0}
    assert device_memory(SimpleNamespace(memory_stats=lambda: None)) == {}
