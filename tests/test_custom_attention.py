"""The example of an attention from outside the repository, used as a user's own files would be."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqeff import config
from seqeff.checks import ConfigError
from seqeff.models import Attention
from seqeff.models.attention.protocol import Heads
from seqeff.models.flops import entries_of_tokens
from seqeff_kernels.range_attention import range_attention

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "experiments/custom_attention"
LENGTH = 63
SMALL = (
    "TransformerConfig.width=32",
    "TransformerConfig.layers=2",
    "FeedForward.hidden=32",
    "IntervalAttention.interval=5",
    "IntervalAttention.initial_tokens=2",
    "IntervalAttention.window=4",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The example's model, made small, from copies of its two files elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(EXAMPLE / "interval_attention.py", folder)
    text, included = (EXAMPLE / "custom.gin").read_text(), "../../configs/quickstart.gin"
    assert text.count(included) == 1
    gin_file = folder / "custom.gin"
    gin_file.write_text(text.replace(included, str(REPOSITORY / "configs/quickstart.gin")))
    loaded = config.load(gin_file, SMALL)
    assert loaded.modules == {"interval_attention": folder / "interval_attention.py"}
    return loaded.root.model


@pytest.fixture(scope="module")
def documents():
    """Tokens, and where the document of each begins."""
    tokens = np.random.default_rng(0).integers(0, 4096, (2, LENGTH))
    token = np.arange(LENGTH)
    starts = np.stack([np.where(token < 20, 0, np.where(token < 50, 20, 50)), np.zeros_like(token)])
    return tokens, starts


def naive_mask(attention, starts):
    """[batch, rows, entries] by definition."""
    token = np.arange(LENGTH)
    position = token - starts
    kept = (position < attention.initial_tokens) | (position % attention.interval == 0)
    recent = token[:, None] - token < attention.window
    own_document = (token[:, None] >= token) & (token >= starts[..., None])
    return own_document & (kept[:, None] | recent)


def test_the_file_in_the_repository_loads():
    attention = config.load(EXAMPLE / "custom.gin").root.model.attention
    assert isinstance(attention, Attention)
    assert dataclasses.asdict(attention) == {"interval": 8, "initial_tokens": 3, "window": 64}


def test_mistakes_in_its_fields():
    with pytest.raises(ConfigError, match=r"IntervalAttention\.interval = 0 must"):
        config.load(EXAMPLE / "custom.gin", ["IntervalAttention.interval=0"])


def test_it_attends_the_tokens_of_its_mask(model, documents):
    tokens, starts = documents
    attention, mask = model.attention, naive_mask(model.attention, starts)
    # equal scores and one-hot values: the output lists the attended tokens
    values = jnp.broadcast_to(jnp.eye(LENGTH), (2, LENGTH, LENGTH))[:, :, None]

    @jax.jit
    def attended(tokens, starts):
        zeros = jnp.zeros_like(values)
        heads = Heads(queries=zeros, keys=zeros, values=values)
        return range_attention(zeros, attention.sources(attention.plan(tokens, starts), heads, 0))[
            0
        ]

    weights = attended(tokens, starts)[:, :, 0]
    np.testing.assert_allclose(weights, mask / mask.sum(-1, keepdims=True), atol=1e-6)


def test_it_decodes_with_every_token_of_its_document(model, documents):
    tokens, starts = documents
    attended, held = jax.jit(functools.partial(entries_of_tokens, model))(tokens, starts)
    np.testing.assert_allclose(attended, naive_mask(model.attention, starts).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(held, np.arange(LENGTH) - starts + 1)


def test_the_model_is_causal_and_keeps_documents_apart(model, documents):
    tokens, starts = documents
    graph, parameters = nnx.split(model.make(nnx.Rngs(0)))
    forward = jax.jit(lambda tokens, starts: nnx.merge(graph, parameters)(tokens, starts))
    whole = np.asarray(forward(tokens, starts))
    later = np.arange(LENGTH) > 40
    changed = np.asarray(forward(np.where(later, tokens + 1, tokens) % 4096, starts))
    np.testing.assert_array_equal(changed[:, :41], whole[:, :41])
    assert np.all(np.any(changed[:, 41:] != whole[:, 41:], axis=-1))
    # the first row's last document begins at 50
    earlier = np.arange(LENGTH) < 50
    changed = np.asarray(forward(np.where(earlier, tokens + 1, tokens) % 4096, starts))
    np.testing.assert_array_equal(changed[0, 50:], whole[0, 50:])
    assert np.all(np.any(changed[1, 50:] != whole[1, 50:], axis=-1))
