"""The README's tables of training speed, from the measurements beside this file.

python experiments/training_speed/table.py
"""

from __future__ import annotations

import json
from pathlib import Path

_CARDS = ("h200", "h100")


def table(card: str) -> str:
    """Markdown, a row a config; tokens a second of whole training steps on one of the cards."""
    report = json.loads(Path(__file__).with_name(f"{card}.json").read_text())
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
    for card in _CARDS:
        print(f"{card}\n\n{table(card)}\n")
