"""The shares of attention in the headers of the configs are those of the formula."""

import re
from pathlib import Path

import pytest

from seqeff import config
from seqeff.analysis import model_attended_share

FOLDER = Path(__file__).parents[2] / "configs" / "sepllm"
FILES = [path for path in sorted(FOLDER.glob("*.gin")) if not path.stem.endswith("recipe")]
PILE, BOOKS = 0.1152, 0.164


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_share(path):
    density = BOOKS if path.stem.startswith("small") else PILE
    share = 100 * model_attended_share(config.load(path).root.model, 2048, density)
    stated = re.search(r"([\d.]+)% of (?:dense )?causal attention", path.read_text())
    assert stated is not None
    digits = len(stated[1].partition(".")[2])
    assert round(share, digits) == float(stated[1])
