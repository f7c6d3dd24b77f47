"""The configs of the repository."""

from pathlib import Path

import pytest

from seqeff import config

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("*.gin"))
MODELS = sorted(CONFIGS.glob("models/*.gin"))


@pytest.fixture(autouse=True)
def real_packages(monkeypatch, folder):
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("path", "root"),
    [(path, "Train") for path in RUNS] + [(path, "TransformerConfig") for path in MODELS],
    ids=lambda value: getattr(value, "stem", value),
)
def test_loads_and_its_operative_config_loads_to_the_same(path, root, tmp_path):
    first = config.load(path, root=root)
    saved = tmp_path / "operative_config.gin"
    saved.write_text(first.operative)
    again = config.load(saved, root=root)
    assert again.root == first.root
    assert again.operative == first.operative


def test_there_are_some():
    assert RUNS
    assert MODELS
