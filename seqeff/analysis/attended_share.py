"""The share of dense causal attention that a sparse one keeps, from the separators' density."""

from __future__ import annotations

import dataclasses

import numpy as np

from seqeff.checks import ConfigError
from seqeff.models import Attention, DenseAttention, SeparatorAttention, TransformerConfig


def attended_share(attention: Attention, length: int, density: float = 0.0) -> float:
    """Pairs of a row and an entry that are attended, of the `length (length + 1) / 2` causal ones.

    A row attends its window, the initial tokens before it, and of the tokens between these two a
    fraction `density`, in the mean, or at most `SeparatorAttention.separators` of them. Source:
    SepLLM (arXiv 2412.12094), Table 3, which this reproduces with a density of 0.1152.

    Args:
      density: of the separators that are found by text or id; those of an `interval` come on top.

    Raises:
      ConfigError: the attention is not one of these, or the density no fraction.
    """
    if not 0 <= density <= 1:
        raise ConfigError(f"the density of separators is {density}; give a fraction from 0 to 1")
    row = np.arange(length)
    match attention:
        case DenseAttention():
            attended = np.minimum(row + 1, attention.window or length).astype(np.float64)
        case SeparatorAttention():
            before = np.maximum(row + 1 - attention.window, 0)
            initial = np.minimum(before, attention.initial_tokens)
            between = before - initial
            kept_density = _kept_density(attention, density)
            kept = kept_density * between
            if attention.separators is not None:
                most = _expected_minimum(length, kept_density, attention.separators)
                kept = most[between]
            attended = np.minimum(row + 1, attention.window) + initial + kept
        case _:
            raise ConfigError(f"no formula is known for the share of {type(attention).__name__}")
    return float(attended.sum() / (length * (length + 1) / 2))


def model_attended_share(config: TransformerConfig, length: int, density: float = 0.0) -> float:
    """The mean of `attended_share` over the layers of a model."""
    shares = [attended_share(attention, length, density) for attention in config.attentions()]
    return sum(shares) / len(shares)


def _kept_density(attention: SeparatorAttention, density: float) -> float:
    """The fraction of tokens that count as separators, by text or by an interval."""
    found = density if dataclasses.replace(attention, interval=None).might_keep else 0.0
    if attention.interval is None:
        return found
    return 1 - (1 - found) * (1 - 1 / attention.interval)


def _expected_minimum(most: int, density: float, limit: int) -> np.ndarray:
    """The mean of `min(limit, separators)` among 0, 1, ..., `most` tokens that are independent."""
    fewer = np.zeros(limit)  # the chance of 0, 1, ..., limit - 1 separators so far
    fewer[0] = 1.0
    means = np.zeros(most + 1)
    for count in range(1, most + 1):
        # one more token adds a separator that counts, where there were fewer than the limit
        means[count] = means[count - 1] + density * fewer.sum()
        fewer[1:] = fewer[1:] * (1 - density) + fewer[:-1] * density
        fewer[0] *= 1 - density
    return means
