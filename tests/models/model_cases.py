"""Small models, attentions with the masks that define them, and naive attention through a mask."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqeff.models import (
    CachedTransformer,
    DenseAttention,
    FeedForward,
    HeadProjections,
    RMSNorm,
    SeparatorAttention,
    TransformerConfig,
    cached_parameters,
)
from seqeff.models.flops import abstract_model

# most of a small test's time is compilation
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

VOCABULARY = 97
SEPARATORS = (2, 3, 5, 7, 11, 13)


def _outside_attention() -> Any:
    path = Path(__file__).parents[2] / "experiments/custom_attention/interval_attention.py"
    spec = importlib.util.spec_from_file_location("outside_attention", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["outside_attention"] = module
    spec.loader.exec_module(module)
    return module.IntervalAttention


IntervalAttention = _outside_attention()

ATTENTIONS = {
    "dense": DenseAttention(),
    "window": DenseAttention(window=9),
    "separator": SeparatorAttention(window=7, initial_tokens=3, separator_ids=SEPARATORS),
    "streaming": SeparatorAttention(window=1, initial_tokens=4, separator_ids=()),
    "bounded": SeparatorAttention(
        window=5, initial_tokens=2, separators=3, separator_ids=SEPARATORS
    ),
    "bounded alone": SeparatorAttention(
        window=3, initial_tokens=0, separators=1, separator_ids=SEPARATORS
    ),
    "fixed": SeparatorAttention(window=4, initial_tokens=2, separator_ids=(), interval=5),
    "of the row": SeparatorAttention(
        window=4, initial_tokens=3, initial_of="row", separator_ids=SEPARATORS
    ),
    "compact": SeparatorAttention(
        window=6, initial_tokens=2, separators=4, separator_ids=SEPARATORS, positions="compact"
    ),
    "interval": IntervalAttention(interval=5, initial_tokens=2, window=4),
}

# decodes with the published cache
PUBLISHED = SeparatorAttention(
    window=6,
    initial_tokens=2,
    separators=3,
    separator_ids=SEPARATORS,
    positions="compact",
    cache_entries=16,
)


def naive_mask(attention: Any, tokens: np.ndarray, document_start: np.ndarray) -> np.ndarray:
    """[batch, rows, entries]: which tokens each token attends, by definition."""
    row = np.arange(tokens.shape[1])
    entry, position = row[None, None, :], row - document_start
    age = row[None, :, None] - entry
    own_document = (age >= 0) & (entry >= document_start[:, :, None])
    match attention:
        case DenseAttention():
            kept = np.full(tokens.shape, attention.window is None)
        case SeparatorAttention():
            token = np.arange(tokens.shape[1])
            first = document_start if attention.initial_of == "document" else document_start[:, :1]
            initial = (token >= first) & (token - first < attention.initial_tokens)
            separators = np.isin(tokens, attention.separator_ids)
            if attention.interval is not None:
                separators |= position % attention.interval == 0
            near = age < attention.window
            far = own_document & ~near & (separators & ~initial)[:, None, :]
            if attention.separators is not None:
                newest = np.cumsum(far[..., ::-1], axis=-1)[..., ::-1]
                far &= newest <= attention.separators
            return own_document & (near | far | initial[:, None, :])
        case IntervalAttention():
            kept = (position < attention.initial_tokens) | (position % attention.interval == 0)
    return own_document & (kept[:, None, :] | (age < (attention.window or 1)))


def documents(length: int, *firsts: tuple[int, ...]) -> np.ndarray:
    """`document_start` of rows whose documents begin at the given tokens, 0 among them."""
    starts = np.zeros((len(firsts), length), np.int32)
    for row, begins in zip(starts, firsts, strict=True):
        for first in sorted(begins):
            row[first:] = first
    return starts


def random_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def masked_attention(queries: Any, keys: Any, values: Any, mask: Any) -> jax.Array:
    """Softmax over the masked scores in float32; [batch, length, heads, head_dim]."""
    group = queries.shape[2] // keys.shape[2]
    keys, values = (jnp.repeat(array, group, axis=2) for array in (keys, values))
    scores = jnp.einsum("bihd,bjhd->bhij", queries, keys, precision="highest")
    scores = jnp.where(mask[:, None], scores * queries.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhij,bjhd->bihd", weights, values, precision="highest")


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """The caches' own bound of 1e-5, and of the largest entry where that is below 1."""
    bound = 1e-5 * min(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def small_config(**changes: Any) -> TransformerConfig:
    """Two float32 layers of 32 with 4 query and 2 key heads of 8."""
    defaults = {
        "vocabulary_size": VOCABULARY,
        "width": 32,
        "layers": 2,
        "projections": HeadProjections(heads=4, kv_heads=2),
        "feed_forward": FeedForward(hidden=48),
        "norm": RMSNorm(),
        "dtype": "float32",
    }
    return TransformerConfig(**defaults | changes)


def random_model(config: TransformerConfig, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """Graph and random parameters of a model: biases and norms too, and nothing to compile."""
    graph, state = nnx.split(abstract_model(config))
    random = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(random.normal(0.1, 0.2, leaf.shape), leaf.dtype)

    return graph, jax.tree.map(draw, nnx.to_pure_dict(state))


def extending(config: TransformerConfig, parameters: Any) -> Any:
    """A compiled function of (tokens, cache, [count]); see `CachedTransformer.extend`."""
    given = cached_parameters(config, parameters)

    def extend(parameters: Any, *inputs: Any) -> Any:
        return CachedTransformer.of(config, parameters).extend(*inputs)

    return functools.partial(quick_jit(extend), given)


def hidden(graph: nnx.GraphDef, parameters: Any, tokens: Any, document_start: Any = None) -> Any:
    """The model's output, compiled quickly."""
    return quick_jit(lambda parameters: nnx.merge(graph, parameters)(tokens, document_start))(
        parameters
    )
