import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from seqeff import config

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "experiments").rglob("README.md")),
    *sorted((REPOSITORY / "kernels").rglob("README.md")),
]


def test_the_tables_of_training_speed_are_the_measurements():
    path = REPOSITORY / "experiments" / "training_speed" / "table.py"
    spec = importlib.util.spec_from_file_location("table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert module.table() in readme
    assert module.separators_table() in readme


def test_the_config_in_the_readme_loads(tmp_path):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    configs = shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (configs / "mine.gin").write_text(example)
    assert config.load(configs / "mine.gin").root.steps == 10_000


def test_the_overrides_of_the_quickstart_in_the_readme_are_ones():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"seqeff train configs/quickstart\.gin([^`\n]*)", text)
    overrides = [found for line in lines for found in re.findall(r"--gin\.(\S+)", line)]
    assert len(overrides) >= 2
    for override in overrides:
        config.load(REPOSITORY / "configs/quickstart.gin", [override])


def test_the_configs_of_the_table_are_those_that_the_command_times():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"`seqeff bench train (configs/\S+)`", text)
    report = json.loads((REPOSITORY / "experiments/training_speed/h200.json").read_text())
    timed = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob(pattern))
    assert timed == sorted(row["config"] for row in report["results"])


def test_every_file_that_the_readme_links_exists():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_can_be_pasted_into_a_shell(page):
    for block in re.findall(
        r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    ):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert not checked.stderr, block
