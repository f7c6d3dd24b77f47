"""The README's tables of training speed, from the measurements beside this file.

python experiments/training_speed/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def table() -> str:
    """Markdown, a row a config; tokens a second of whole training steps on an H200."""
    lines = [
        "| config | tokens a step | tokens/s | model FLOPs used | temporary memory |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(_results("h200"), key=lambda row: (row["config"], row["sequence_length"])):
        lines.append(
            f"| `{Path(row['config']).name}` | {row['sequence_length']} × {row['batch_size']} "
            f"| {row['tokens_per_second']:,} | {row['mfu']:.0%} | {row['temporary_gib']:.0f} GiB |"
        )
    return "\n".join(lines)


def separators_table() -> str:
    """Markdown, a row a length; dense attention and separators on an H100."""
    lines = [
        "| tokens a step | dense | window 64 and every separator | times |",
        "|---|---|---|---|",
    ]
    rows = {row["config"].removesuffix(".gin"): row for row in _results("h100")}
    pairs = [(row, rows[f"{name}_n64"]) for name, row in rows.items() if f"{name}_n64" in rows]
    for dense, ours in sorted(pairs, key=lambda pair: pair[0]["sequence_length"]):
        speeds = [row["tokens_per_second"] for row in (dense, ours)]
        lines.append(
            f"| {dense['sequence_length']} × {dense['batch_size']} "
            f"| {speeds[0]:,} | {speeds[1]:,} | {speeds[1] / speeds[0]:.2f} |"
        )
    return "\n".join(lines)


def _results(card: str) -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name(f"{card}.json").read_text())["results"]


if __name__ == "__main__":
    print(f"{table()}\n\n{separators_table()}")
