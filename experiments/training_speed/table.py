"""The README's table of training speed, from the measurement beside this file.

python experiments/training_speed/table.py
"""

from __future__ import annotations

import json
from pathlib import Path

_RESULTS = Path(__file__).with_name("h200.json")


def table() -> str:
    """Markdown, a row a config; thousands of tokens a second of whole training steps."""
    report = json.loads(_RESULTS.read_text())
    lines = [
        "| config | tokens a step | tokens/s | model FLOPs used | temporary memory |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(report["results"], key=lambda row: (row["config"], row["sequence_length"])):
        lines.append(
            f"| `{Path(row['config']).name}` | {row['sequence_length']} × {row['batch_size']} "
            f"| {row['tokens_per_second']:,} | {row['mfu']:.0%} | {row['temporary_gib']:.0f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
