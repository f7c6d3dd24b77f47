import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

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
