"""Config objects as gin files."""

import pytest

from seqeff import config
from seqeff.data import Data, NoText, TextFiles, TokenizerFile
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    Llama3Scaling,
    LowRankLinear,
    RMSNorm,
    Rotary,
    SeparatorAttention,
    TransformerConfig,
)
from seqeff.training import Train


@pytest.fixture(autouse=True)
def real_packages(monkeypatch, folder):
    monkeypatch.undo()


def train(**model):
    return Train(
        model=TransformerConfig(
            vocabulary_size=300,
            width=8,
            layers=4,
            projections=HeadProjections(heads=2),
            feed_forward=FeedForward(
                hidden=5, up=LowRankLinear(rank=2), down=LowRankLinear(rank=3)
            ),
            **model,
        ),
        data=Data(
            source=NoText(),
            tokenizer=TokenizerFile(path="/a folder/it's"),
            sequence_length=16,
            batch_size=1,
        ),
        steps=1,
    )


CASES = {
    "defaults": train(),
    "parts": train(
        norm=RMSNorm(epsilon=1e-6),
        positions=Rotary(
            base=5e5,
            scaling=Llama3Scaling(
                factor=8.0,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
                original_length=8192,
            ),
        ),
    ),
    "layers": train(
        attention=DenseAttention(window=7),
        layer_attention={
            0: DenseAttention(),
            1: SeparatorAttention(separator_ids=(1, 2)),
            2: DenseAttention(),
            -1: DenseAttention(window=1),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_loads_to_an_equal_config(case, tmp_path):
    path = tmp_path / "written.gin"
    path.write_text(config.write(CASES[case]))
    loaded = config.load(path)
    assert loaded.root == CASES[case]
    operative = tmp_path / "operative.gin"
    operative.write_text(loaded.operative)
    assert config.load(operative).root == CASES[case]


def test_an_object_is_written_once():
    text = config.write(CASES["layers"])
    assert "layer_attention_0/DenseAttention.window = None" in text
    assert text.count("DenseAttention.window = None") == 1
    assert TextFiles.__name__ not in text
