"""The share of dense causal attention that a sparse one keeps, from the separators' density."""

from __future__ import annotations

from seqeff.checks import ConfigError
from seqeff.models import Attention, MeasuredAttention, TransformerConfig


def attended_share(attention: Attention, length: int, density: float = 0.0) -> float:
    """Pairs of a row and an entry that are attended, of the `length (length + 1) / 2` causal ones.

    Source: SepLLM (arXiv 2412.12094), Table 3, which this reproduces with a density of 0.1152.

    Args:
      density: of the separators that are found by text or id.

    Raises:
      ConfigError: the attention has no formula (`MeasuredAttention`), or the density is no
        fraction.
    """
    if not 0 <= density <= 1:
        raise ConfigError(f"the density of separators is {density}; give a fraction from 0 to 1")
    if not isinstance(attention, MeasuredAttention):
        raise ConfigError(f"no formula is known for the share of {type(attention).__name__}")
    attended = attention.attended(length, density)
    return float(attended.sum() / (length * (length + 1) / 2))


def model_attended_share(config: TransformerConfig, length: int, density: float = 0.0) -> float:
    """The mean of `attended_share` over the layers of a model."""
    shares = [attended_share(attention, length, density) for attention in config.attentions()]
    return sum(shares) / len(shares)
