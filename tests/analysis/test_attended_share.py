"""The paper's percentages, and the formula against counted masks."""

import dataclasses

import numpy as np
import pytest

from seqeff.analysis import attended_share, model_attended_share
from seqeff.checks import ConfigError
from seqeff.models import (
    DenseAttention,
    FeedForward,
    HeadProjections,
    SeparatorAttention,
    TransformerConfig,
)

PILE = 0.1152
SEPLLM = SeparatorAttention(window=64, initial_tokens=3, separator_ids=(1,))


def test_streamingllm_is_exact():
    streaming = dataclasses.replace(SEPLLM, separator_ids=())
    assert round(100 * attended_share(streaming, 2048), 3) == 6.434


@pytest.mark.parametrize(
    ("window", "dense_layers", "percent"),
    [(64, (), 17.21), (128, (), 22.47), (64, (0,), 24.11), (64, (0, -1), 31.01)],
    ids=["n=64", "n=128", "H", "H/T"],
)
def test_the_papers_models(window, dense_layers, percent):
    config = TransformerConfig(
        vocabulary_size=8,
        width=8,
        layers=12,
        projections=HeadProjections(heads=1),
        feed_forward=FeedForward(hidden=8),
        attention=dataclasses.replace(SEPLLM, window=window),
        layer_attention={layer: DenseAttention() for layer in dense_layers},
    )
    assert round(100 * model_attended_share(config, 2048, PILE), 2) == percent


def test_only_what_is_kept_counts():
    """A density changes nothing without separators, and an interval adds its own."""
    streaming = dataclasses.replace(SEPLLM, separator_ids=())
    assert attended_share(streaming, 500, 0.3) == attended_share(streaming, 500)
    fixed = dataclasses.replace(streaming, interval=5)
    assert attended_share(fixed, 500, 0.3) == attended_share(SEPLLM, 500, 0.2)
    both = dataclasses.replace(SEPLLM, interval=5)
    assert attended_share(both, 500, 0.3) == pytest.approx(attended_share(SEPLLM, 500, 0.44))


def test_dense_attention_keeps_all():
    assert attended_share(DenseAttention(), 100) == 1
    assert attended_share(DenseAttention(window=1), 100) == pytest.approx(2 / 101)
    assert attended_share(SeparatorAttention(window=8, initial_tokens=0), 100, 1.0) == 1


@pytest.mark.parametrize("limit", [1, 3, 40])
def test_bounded_separators_against_random_texts(limit):
    length, density, window, initial = 200, 0.2, 8, 3
    attention = SeparatorAttention(
        window=window, initial_tokens=initial, separators=limit, separator_ids=(1,)
    )
    drawn = np.random.default_rng(0).random((10_000, length)) < density
    separators = drawn & (np.arange(length) >= initial)
    before = np.maximum(np.arange(length) + 1 - window, 0)
    passed = np.pad(np.cumsum(separators, axis=1), ((0, 0), (1, 0)))[:, before]
    row = np.minimum(np.arange(length) + 1, window) + np.minimum(before, initial)
    counted = (row + np.minimum(passed, limit).mean(0)).sum() / (length * (length + 1) / 2)
    assert attended_share(attention, length, density) == pytest.approx(counted, rel=2e-3)


def test_what_has_no_share():
    with pytest.raises(ConfigError, match="no formula is known for the share of object"):
        attended_share(object(), 10)
    with pytest.raises(ConfigError, match=r"density of separators is 1\.5; give a fraction"):
        attended_share(SEPLLM, 10, 1.5)
