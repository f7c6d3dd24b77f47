"""The model: a Transformer whose parts are frozen configs with a `make` method each."""

from seqeff.models.attention import (
    Attention,
    DenseAttention,
    MeasuredAttention,
    NamedStream,
    SeparatorAttention,
)
from seqeff.models.cached import (
    Cache,
    CachedTransformer,
    cached_parameters,
    emptied_rows,
    empty_cache,
    most_kept,
)
from seqeff.models.cross_entropy import cross_entropy_sums, token_losses
from seqeff.models.feed_forward import FeedForward
from seqeff.models.initialisation import NormalInitialisation, SmallInitialisation
from seqeff.models.linear import DenseLinear, LowRankLinear
from seqeff.models.norms import LayerNorm, RMSNorm
from seqeff.models.parameters import parameter_shardings
from seqeff.models.positions import BilevelPositions, LearnedPositions, NoPositions, Rotary
from seqeff.models.projections import HeadProjections
from seqeff.models.rotary_scaling import LinearScaling, Llama3Scaling, RotaryScaling, YarnScaling
from seqeff.models.transformer import Transformer, TransformerConfig

__all__ = [
    "Attention",
    "BilevelPositions",
    "Cache",
    "CachedTransformer",
    "DenseAttention",
    "DenseLinear",
    "FeedForward",
    "HeadProjections",
    "LayerNorm",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LowRankLinear",
    "MeasuredAttention",
    "NamedStream",
    "NoPositions",
    "NormalInitialisation",
    "RMSNorm",
    "Rotary",
    "RotaryScaling",
    "SeparatorAttention",
    "SmallInitialisation",
    "Transformer",
    "TransformerConfig",
    "YarnScaling",
    "cached_parameters",
    "cross_entropy_sums",
    "emptied_rows",
    "empty_cache",
    "most_kept",
    "parameter_shardings",
    "token_losses",
]
