import importlib.util
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_table_of_training_speed_is_the_measurement():
    path = REPOSITORY / "experiments" / "training_speed" / "table.py"
    spec = importlib.util.spec_from_file_location("table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_readme_links_exists():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
