"""Training losses of the small models, from their metrics beside this file, to losses.png.

    python experiments/sepllm/plot.py

Needs matplotlib.
"""

import json
from pathlib import Path

_HERE = Path(__file__).parent
# of the mean over neighbouring lines of metrics
_SMOOTHED = 5


def losses(path: Path) -> tuple[list[float], list[float]]:
    """Millions of tokens, and the loss there."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    tokens, found = [], []
    for first in range(len(rows) - _SMOOTHED + 1):
        near = rows[first : first + _SMOOTHED]
        tokens.append(near[-1]["tokens"] / 1e6)
        found.append(sum(row["loss"] for row in near) / _SMOOTHED)
    return tokens, found


def main() -> None:
    """Draws every run that began from nothing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SystemExit(f"plot: {error}; pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for path in sorted((_HERE / "small_models").glob("*.jsonl")):
        if "post_training" not in path.stem:
            axes.plot(*losses(path), label=path.stem, linewidth=1.0)
    axes.set(xlabel="million tokens", ylabel="training loss, nats a token", ylim=(3.2, 5.5))
    axes.legend()
    figure.savefig(_HERE / "losses.png", dpi=120)


if __name__ == "__main__":
    main()
