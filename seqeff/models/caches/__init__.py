"""What a model remembers of a row while it decodes, a file a kind."""

from seqeff.models.caches.blocks import BlockCache
from seqeff.models.caches.entries import aligned
from seqeff.models.caches.layers import LayersCache, kind_of, replace_rows, select_rows, where_rows
from seqeff.models.caches.protocol import CachedAttention, CacheKind, Sizes
from seqeff.models.caches.published import PublishedCache
from seqeff.models.caches.whole import TokenCache, WholeCache

__all__ = [
    "BlockCache",
    "CacheKind",
    "CachedAttention",
    "LayersCache",
    "PublishedCache",
    "Sizes",
    "TokenCache",
    "WholeCache",
    "aligned",
    "kind_of",
    "replace_rows",
    "select_rows",
    "where_rows",
]
