"""Speed-up over cuDNN's dense causal attention by length, from the measurement beside this file.

    python experiments/attention_speed/plot.py [--implementation auto] [--family wide]

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_PASSES = {"forward": "forward", "forward_and_backward": "forward and backward"}

Curves = dict[tuple[int, str], list[tuple[int, float]]]


def curves(report: dict[str, Any], implementation: str, family: str) -> Curves:
    """Lengths and speed-ups, ascending, by window and pass."""
    found: Curves = {}
    for row in report["results"]:
        of_family = re.fullmatch(rf"{re.escape(family)}-\d+k", row["shape"])
        if row["implementation"] != implementation or not of_family:
            continue
        for name in _PASSES:
            speedup = (row.get(name) or {}).get("speedup")
            kind = row.get("kind") or "separators"
            if row["window"] is not None and speedup is not None and kind == "separators":
                found.setdefault((row["window"], name), []).append((row["length"], speedup))
    return {key: sorted(points) for key, points in sorted(found.items())}


def draw(found: Curves, title: str, path: Path) -> None:
    """Writes a PNG: one line a window and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (window, name), points in found.items():
        style = "-" if name == "forward" else "--"
        label = f"window {window}, {_PASSES[name]}"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    lengths = sorted({length for points in found.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens in a row", ylabel="speed-up over cuDNN, dense causal", title=title)
    axes.legend()
    figure.savefig(path, dpi=160)


def main() -> int:
    """Draws one family of shapes; 2 where there is nothing to draw, or nothing to draw with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=_HERE / "attention_h200.json")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--family", default="wide", help="shapes whose names are it and a length")
    parser.add_argument("--out", type=Path, default=_HERE / "speedup.png")
    options = parser.parse_args()
    try:
        report = json.loads(options.results.read_text())
        found = curves(report, options.implementation, options.family)
        if not found:
            raise ValueError(f"no {options.implementation} of {options.family} is there")
        draw(found, report["device"]["kind"], options.out)
    except (OSError, ValueError) as error:
        print(f"plot: {options.results}: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"plot: {error}; pip install -e '.[plot]'", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
