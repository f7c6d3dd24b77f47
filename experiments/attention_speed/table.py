"""The tables of the README beside this file, from the measurements beside it.

    python experiments/attention_speed/table.py

writes them into the README, between their markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
README = _HERE / "README.md"
_MODES = {True: "yes", False: "no", None: "not known"}


def attention_table(report: dict[str, Any]) -> str:
    """Markdown, a row a measurement; cuDNN's attention is dense and causal, as of JAX."""
    lines = [
        f"On {_origin(report)}:",
        "",
        "| shape | window | implementation | forward, ms | × cuDNN | × flex | TFLOP/s needed | "
        "forward and backward, ms | × cuDNN | × flex | TFLOP/s needed | gather, ms | "
        "transpose, ms | indices, ms | executed / needed | deterministic |",
        f"|{'---|' * 16}",
    ]
    for row in report["results"]:
        kind = row.get("kind") or "separators"
        other = "" if kind == "separators" else f", {kind}"
        cells = [row["shape"], f"{row['window'] or 'dense'}{other}", _label(row)]
        if "error" in row:
            lines.append(f"| {' | '.join(cells)} | {row['error'].replace('|', '/')} |{' |' * 12}")
            continue
        for key in ("forward", "forward_and_backward"):
            found = row[key]
            speedups = (found["speedup"], found["speedup_over_flex"])
            cells.append(f"{found['milliseconds']:.3f}")
            cells += ["" if speedup is None else f"{speedup:.2f}" for speedup in speedups]
            cells.append(f"{found['tflops_per_second']:.0f}")
        for key in ("gather_milliseconds", "transpose_milliseconds", "index_milliseconds"):
            cells.append("" if row.get(key) is None else f"{row[key]:.3f}")
        executed, needed = row["executed_forward_flops"], row["needed_forward_flops"]
        waste = "" if executed is None else f"{executed / needed:.2f}"
        cells += [waste, _MODES[row["deterministic"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _losses(report)])


def decode_table(report: dict[str, Any]) -> str:
    """Markdown, a row a measurement; shares are of a copy's bytes a second."""
    copies = ", ".join(
        f"{speed / 1e12:.2f} ({way.replace('_', ' ')})"
        for way, speed in report["copy_bytes_per_second"].items()
    )
    lines = [
        f"On {_origin(report)}; copies in the same run: {copies} TB/s; shares are of "
        f"{report['reference_bytes_per_second'] / 1e12:.2f} TB/s:",
        "",
        "| shape | batch | cache | heads / KV heads × head size | implementation | µs | × cuDNN | "
        "× flex | TB/s | share | executed / needed |",
        f"|{'---|' * 11}",
    ]
    cudnn = {
        row["shape"]: row.get("microseconds")
        for row in report["results"]
        if row["implementation"] == "cudnn"
    }
    slower = []
    for row in report["results"]:
        cells = [
            row["shape"],
            str(row["batch"]),
            " + ".join(map(str, row["capacities"])),
            f"{row['heads']} / {row['kv_heads']} × {row['head_dim']}",
            _label(row),
        ]
        if "error" in row:
            lines.append(f"| {' | '.join(cells)} | {row['error'].replace('|', '/')} | | | | | |")
            continue
        theirs = cudnn.get(row["shape"])
        speedup = None if theirs is None else theirs / row["microseconds"]
        if row["implementation"] == "auto" and speedup is not None and round(speedup, 2) < 1:
            slower.append(f"{row['shape']} ({speedup:.2f}×)")
        cells += [f"{row['microseconds']:.1f}", "" if speedup is None else f"{speedup:.2f}"]
        over_flex = row.get("speedup_over_flex")
        cells.append("" if over_flex is None else f"{over_flex:.2f}")
        cells.append(f"{row['bytes_per_second'] / 1e12:.2f}")
        spent = row.get("executed_flops")
        ratio = "" if spent is None else f"{spent / row['needed_flops']:.0f}"
        lines.append(f"| {' | '.join(cells)} | {row['share']:.0%} | {ratio} |")
    lost = f"Slower than cuDNN under `auto`: {', '.join(slower)}." if slower else ""
    return "\n".join([*lines, "", lost or "`auto` is not slower than cuDNN in any of these."])


# what a table is called in the README, its file, and what makes it
TABLES: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "attention": (_HERE / "attention_h200.json", attention_table),
    "decode": (_HERE / "decode_h200.json", decode_table),
    "attention-h100": (_HERE / "attention_h100.json", attention_table),
    "decode-h100": (_HERE / "decode_h100.json", decode_table),
}


def filled(text: str) -> str:
    """A README with every table that there is a measurement for."""
    for name, (path, make) in TABLES.items():
        table = make(json.loads(path.read_text())) if path.exists() else "Not measured yet."
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, count = block.subn(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"the README has {count} places for the table of {name}")
    return text


def _label(row: dict[str, Any]) -> str:
    """The implementation, and the backend that `auto` took where that is recorded."""
    name, backend = row["implementation"], row.get("backend")
    return f"auto: {backend}" if name == "auto" and backend else name


def _losses(report: dict[str, Any]) -> str:
    """Where the kernel that `auto` chooses is slower than dense attention."""
    slower = [
        f"{row['shape']} at window {row['window']} {name.replace('_', ' ')} ({speedup:.2f}×)"
        for row in report["results"]
        if row["implementation"] == "auto"
        for name in ("forward", "forward_and_backward")
        for speedup in [(row.get(name) or {}).get("speedup")]
        if speedup is not None and speedup < 1
    ]
    if not slower:
        return "`auto` is not slower than cuDNN's dense causal attention in any of these."
    return f"Slower than cuDNN's dense causal attention under `auto`: {', '.join(slower)}."


def _origin(report: dict[str, Any]) -> str:
    packages = report["versions"]["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}"
        for name in ("jax", "jax-triton", "triton")
        if packages.get(name) is not None
    )
    commit = report["versions"]["commit"]
    return f"one {report['device']['kind']}, {versions}" + (
        f", commit {commit[:12]}" if commit else ""
    )


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
