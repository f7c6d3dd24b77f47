"""The README's tables of training speed, from the measurements beside this file.

python experiments/training_speed/table.py
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

_BOUNDED = "SeparatorAttention.separators=64"


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
    """Markdown, a row a length; dense attention and separators on an H200."""
    lines = [
        "| tokens a step | dense | window 64, every separator | times "
        "| window 64, the last 64 separators | times |",
        f"|{'---|' * 6}",
    ]
    rows = sorted(_results("separators_h200"), key=lambda row: row["sequence_length"])
    for length, of_length in itertools.groupby(rows, lambda row: row["sequence_length"]):
        measured = list(of_length)
        dense, every, last = (
            next(
                row
                for row in measured
                if row["config"].endswith(f"k{name}.gin") and row["overrides"] == overrides
            )
            for name, overrides in (("", []), ("_n64", []), ("_n64", [_BOUNDED]))
        )
        cells = [f"{length} × {dense['batch_size']}", f"{dense['tokens_per_second']:,}"]
        for row in (every, last):
            speed = row["tokens_per_second"]
            cells += [f"{speed:,}", f"{speed / dense['tokens_per_second']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _results(name: str) -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text())["results"]


if __name__ == "__main__":
    print(f"{table()}\n\n{separators_table()}")
