"""The tables and curves of experiments/attention_speed."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "attention_speed"
VERSIONS = {"commit": "0123456789abcdef", "packages": {"jax": "0.11.2", "triton": None}}


def load(name):
    spec = importlib.util.spec_from_file_location(f"attention_speed_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def times(milliseconds, speedup, over_flex=None):
    speedups = {"speedup": speedup, "speedup_over_flex": over_flex}
    return {"milliseconds": milliseconds, **speedups, "tflops_per_second": 399.6}


def row(shape, length, window, implementation, **found):
    return {
        "shape": shape,
        "length": length,
        "window": window,
        "implementation": implementation,
        "deterministic": window is not None,
        "needed_forward_flops": 100,
        "executed_forward_flops": 150,
    } | found


ATTENTION = {
    "versions": VERSIONS,
    "device": {"kind": "NVIDIA H200"},
    "results": [
        row("wide-8k", 8192, None, "cudnn dense", forward=times(2.0, 1.0),
            forward_and_backward=times(8.0, 1.0), executed_forward_flops=None),
        row("wide-8k", 8192, 64, "auto", backend="mosaic", forward=times(0.5, 4.0, 9.0),
            forward_and_backward=times(2.5, 3.2), gather_milliseconds=0.04,
            transpose_milliseconds=0.03, index_milliseconds=0.06),
        row("wide-2k", 2048, 64, "auto", forward=times(0.5, 1.25),
            forward_and_backward=times(2.5, 0.9)),
        row("grouped-2k", 2048, 64, "auto", forward=times(0.5, 2.0),
            forward_and_backward=times(2.5, 1.5)),
        row("wide-8k", 8192, 64, "flex", error="RuntimeError: a|b"),
        row("wide-8k", 8192, 256, "triton", forward=times(0.5, None),
            forward_and_backward=times(2.5, None)),
    ],
}  # fmt: skip
DECODE = {
    "versions": VERSIONS,
    "device": {"kind": "NVIDIA H200"},
    "copy_bytes_per_second": {"memory_copy": 4.2e12, "elementwise": 3.35e12},
    "reference_bytes_per_second": 4.3e12,
    "results": [
        {"shape": "grouped", "batch": 64, "capacities": [4096, 3], "heads": 32, "kv_heads": 8,
         "head_dim": 128, "implementation": "triton", "microseconds": 256.04,
         "bytes_per_second": 4.194e12, "share": 0.9754, "needed_flops": 10, "executed_flops": 40},
        {"shape": "grouped", "batch": 64, "capacities": [4096], "heads": 32, "kv_heads": 8,
         "head_dim": 128, "implementation": "cudnn", "error": "no"},
    ],
}  # fmt: skip


def test_the_readme_holds_the_measurements():
    table = load("table")
    text = table.README.read_text(encoding="utf-8")
    assert table.filled(text) == text


def test_a_measurement_fills_its_place(tmp_path, monkeypatch):
    table = load("table")
    tables = {}
    for name, report in (("attention", ATTENTION), ("decode", DECODE)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report))
        tables[name] = path, table.TABLES[name][1]
    monkeypatch.setattr(table, "TABLES", tables)
    text = table.filled("<!-- attention -->\n<!-- end of attention -->\nkept\n"
                        "<!-- decode -->\nold\n<!-- end of decode -->\n")  # fmt: skip
    assert "\nkept\n" in text
    assert "old" not in text
    assert "On one NVIDIA H200, jax 0.11.2, commit 0123456789ab:" in text
    assert (
        "| 64 | auto: mosaic | 0.500 | 4.00 | 9.00 | 400 | 2.500 | 3.20 |  | 400 | 0.040 | 0.030 "
        "| 0.060 | 1.50 | yes |" in text
    )
    assert "| wide-8k | dense | cudnn dense | 2.000 | 1.00 |" in text
    assert "| 8.000 | 1.00 |  | 400 |  |  |  |  | no |" in text
    assert "| wide-8k | 64 | flex | RuntimeError: a/b | | | | | | | | | | | | |" in text
    assert "| wide-8k | 256 | triton | 0.500 |  |  | 400 |" in text
    lost = "under `auto`: wide-2k at window 64 forward and backward (0.90×).\n"
    assert lost in text
    assert (
        "| grouped | 64 | 4096 + 3 | 32 / 8 × 128 | triton | 256.0 |  |  | 4.19 | 98% | 4 |" in text
    )
    assert "`auto` is not slower than cuDNN in any of these." in text
    assert "4.20 (memory copy), 3.35 (elementwise) TB/s; shares are of 4.30 TB/s" in text
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.count("|") in (17, 12)
    assert table.filled(text) == text
    with pytest.raises(ValueError, match="0 places for the table of decode"):
        table.filled("<!-- attention -->\n<!-- end of attention -->")


def test_a_run_that_loses_nothing_says_so():
    table = load("table")
    report = copy.deepcopy(ATTENTION)
    report["results"] = [row for row in report["results"] if row["shape"] != "wide-2k"]
    assert "is not slower than cuDNN's" in table.attention_table(report)


def test_curves_are_by_window_and_pass():
    curves = load("plot").curves
    assert curves(ATTENTION, "auto", "wide") == {
        (64, "forward"): [(2048, 1.25), (8192, 4.0)],
        (64, "forward_and_backward"): [(2048, 0.9), (8192, 3.2)],
    }
    assert list(curves(ATTENTION, "auto", "grouped")) == [
        (64, "forward"),
        (64, "forward_and_backward"),
    ]
    assert curves(ATTENTION, "triton", "wide") == curves(ATTENTION, "flex", "wide") == {}


def test_a_plot_without_data_or_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    plot = load("plot")
    results = tmp_path / "results.json"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for text, expected in (
        (None, "No such file"),
        ("{", "Expecting property name"),
        (json.dumps(ATTENTION | {"results": []}), "no auto of wide is there"),
        (json.dumps(ATTENTION), "pip install -e '.[plot]'"),
    ):
        if text is not None:
            results.write_text(text)
        arguments = ["--results", str(results), "--out", str(tmp_path / "x.png")]
        monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
        assert plot.main() == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
