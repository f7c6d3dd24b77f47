"""Ways of attending, a file each: the model asks for nothing but `protocol.Attention`."""

from seqeff.models.attention.dense import DenseAttention
from seqeff.models.attention.protocol import Attention, MeasuredAttention, NamedStream
from seqeff.models.attention.separator import SeparatorAttention

__all__ = [
    "Attention",
    "DenseAttention",
    "MeasuredAttention",
    "NamedStream",
    "SeparatorAttention",
]
