"""The shares of attention in the headers of the configs are those of the formula."""

import dataclasses
import re
from pathlib import Path

import pytest

from seqeff import config
from seqeff.analysis import model_attended_share
from seqeff.models import DenseAttention

FOLDER = Path(__file__).parents[2] / "configs" / "sepllm"
SHARE = re.compile(r"([\d.]+)% of (?:dense )?causal attention")
FILES = [path for path in sorted(FOLDER.glob("*.gin")) if SHARE.search(path.read_text())]
PILE, BOOKS = 0.1152, 0.1615


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_share(path):
    model = config.load(path).root.model
    attention = model.attention
    density = BOOKS if path.stem.startswith("small") else PILE
    if attention.interval is not None:
        density = 1 / attention.interval
    if not attention.characters and attention.interval is None:
        density = 0.0
    found = SHARE.search(path.read_text())[1]
    layers = {
        layer: method
        for layer, method in enumerate(model.attentions())
        if isinstance(method, DenseAttention)
    }
    known = dataclasses.replace(model, attention=attention, layer_attention=layers)
    share = 100 * model_attended_share(known, 2048, density)
    digits = len(found.partition(".")[2])
    assert round(share, digits) == float(found)


def test_there_are_some():
    assert len(FILES) == 11
