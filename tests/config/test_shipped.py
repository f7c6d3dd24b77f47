"""The configs of the repository."""

import json
import re
from pathlib import Path

import pytest

from seqeff import config

REPOSITORY = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("configs", "experiments") for path in (REPOSITORY / folder).rglob("*.gin")
)
# parts of other configs; they hold no model of their own
FRAGMENTS = {
    "configs/bench/speed.gin",
    "configs/sepllm/recipe.gin",
    "configs/sepllm/small_recipe.gin",
    "configs/train/small_run.gin",
}


def name(path):
    return str(path.relative_to(REPOSITORY))


ROOTS = {
    name(path): "TransformerConfig" if path.parent.name == "models" else "Train"
    for path in FILES
    if name(path) not in FRAGMENTS
}
RUNS = [path for path, root in ROOTS.items() if root == "Train"]


@pytest.fixture(autouse=True)
def real_packages(monkeypatch, folder):
    monkeypatch.undo()


@pytest.mark.parametrize(("path", "root"), ROOTS.items())
def test_loads_and_its_operative_config_loads_to_the_same(path, root, tmp_path):
    path = REPOSITORY / path
    first = config.load(path, root=root)
    saved = tmp_path / "operative_config.gin"
    saved.write_text(first.operative)
    again = config.load(saved, root=root, module_paths=[path.parent])
    assert again.root == first.root
    assert again.operative == first.operative


def header(path):
    text = (REPOSITORY / path).read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in text.splitlines())
    return text


@pytest.mark.parametrize("path", RUNS)
def test_its_header_has_its_command(path):
    stem = re.escape(path.removesuffix(".gin"))
    assert re.search(rf"^# Run: .* {stem}\.(gin|py)( --gin\..*)?$", header(path), re.MULTILINE)


def test_the_speeds_in_the_headers_are_about_those_measured():
    measured = {}
    for name in ("h200", "separators_h200"):
        report = json.loads((REPOSITORY / f"experiments/training_speed/{name}.json").read_text())
        measured |= {
            row["config"]: row["tokens_per_second"]
            for row in report["results"]
            if not row.get("overrides")
        }
    assert measured.keys() == {path for path in RUNS if path.startswith("configs/bench/")}
    for path, speed in measured.items():
        found = re.search(r"about ([\d,]+) tokens/s", header(path))
        assert found is not None, path
        assert int(found[1].replace(",", "")) == pytest.approx(speed, rel=0.05)


def test_there_are_some():
    assert FRAGMENTS.issubset(map(name, FILES))
    assert {"configs/quickstart.gin", "experiments/gpu_checks/resume.gin"} < set(RUNS)
    assert "TransformerConfig" in ROOTS.values()
