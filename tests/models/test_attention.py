"""Every attention against the mask that defines it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    ATTENTIONS,
    VOCABULARY,
    documents,
    masked_attention,
    naive_mask,
    quick_jit,
    random_tokens,
    small_config,
)

from seqeff.models import Attention, DenseAttention, SeparatorAttention
from seqeff.models.flops import attended_entries
from seqeff.models.heads import Heads
from seqeff.models.positions import Rotary
from seqeff_kernels.range_attention import range_attention

attentions = pytest.mark.parametrize("name", ATTENTIONS)
LENGTH = 63


@functools.cache
def counter(name, first_row, rows):
    """A compiled count of how often each of the given rows attends each token."""
    attention = ATTENTIONS[name]

    def count(tokens, starts, first_row):
        token = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.float32), tokens.shape)
        token = token[..., None, None]
        heads = Heads(jnp.zeros((tokens.shape[0], rows, 1, 1)), token, token, lambda x, _: x)
        plan = attention.plan(tokens, starts)
        counts = jnp.zeros((tokens.shape[0], rows, tokens.shape[1]), jnp.int32)
        for source in attention.sources(plan, heads, first_row):
            _, keys, _, start, end = source.listed(rows)
            entry = jnp.arange(keys.shape[1])
            inside = (entry >= start[..., None]) & (entry < end[..., None])
            inside = jnp.broadcast_to(inside[:, 0], (*counts.shape[:2], entry.size))
            which = jax.nn.one_hot(keys[..., 0, 0], tokens.shape[1], dtype=jnp.int32)
            counts += jnp.einsum("brn,bnt->brt", inside.astype(jnp.int32), which)
        return counts

    if first_row is None:
        return quick_jit(functools.partial(count, first_row=0))
    return quick_jit(count)


token_rows = st.lists(st.integers(0, VOCABULARY - 1), min_size=LENGTH, max_size=LENGTH)
document_rows = st.sets(st.integers(1, LENGTH - 1), max_size=6)


@attentions
@settings(max_examples=25, deadline=None)
@given(tokens=token_rows, begins=document_rows)
def test_each_row_attends_each_token_of_its_mask_once(name, tokens, begins):
    tokens = np.array([tokens], np.int32)
    starts = documents(LENGTH, (0, *begins))
    counts = counter(name, None, LENGTH)(tokens, starts)
    np.testing.assert_array_equal(counts, naive_mask(ATTENTIONS[name], tokens, starts))


@attentions
def test_later_rows_attend_what_they_attend_among_all_rows(name):
    tokens, starts = random_tokens(2, LENGTH), documents(LENGTH, (0, 17, 40), (0,))
    mask = naive_mask(ATTENTIONS[name], tokens, starts)
    count = counter(name, "traced", 5)
    for first in (0, 15, LENGTH - 5):
        np.testing.assert_array_equal(
            count(tokens, starts, first), mask[:, first : first + 5], err_msg=str(first)
        )


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "length", "begins"),
    [
        ("dense", 4, 4, 63, None),
        ("window", 4, 2, 129, ((0, 30, 31), (0, 128), (0,))),
        ("separator", 6, 2, 129, ((0, 1, 70), (0, 12), (0,))),
        ("separator", 3, 1, 63, None),
        ("interval", 2, 2, 129, None),
        ("bounded", 4, 2, 129, ((0, 1, 70), (0, 12), (0,))),
        ("bounded alone", 2, 1, 63, None),
        ("fixed", 4, 4, 63, None),
        ("of the row", 4, 2, 63, ((0, 30), (0, 3), (0,))),
    ],
)
def test_values_and_gradients_equal_naive_attention(name, heads, kv_heads, length, begins):
    attention, random = ATTENTIONS[name], np.random.default_rng(1)
    tokens = random_tokens(3, length)
    starts = None if begins is None else documents(length, *begins)
    mask = naive_mask(
        attention, tokens, documents(length, (), (), ()) if begins is None else starts
    )
    queries, keys, values, cotangent = (
        random.normal(size=(3, length, count, 8)).astype(np.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    )

    def ours(queries, keys, values):
        heads = Heads(queries, keys, values)
        sources = attention.sources(attention.plan(tokens, starts), heads, 0)
        return range_attention(queries, sources)[0]

    def naive(queries, keys, values):
        return masked_attention(queries, keys, values, mask)

    def both(function):
        output, pull = jax.vjp(function, queries, keys, values)
        return output, pull(cotangent)

    actual, expected = quick_jit(lambda: (both(ours), both(naive)))()
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5, rtol=2e-5)


def turn(x, by):
    """[batch, length, heads, 8] turned by so many positions."""
    return Rotary().rotate(x, Rotary().rotation(by, 8))


def turned_attention(queries, keys, values, mask, distance):
    """Naive attention where each row sees each entry at a distance of its own."""
    batch, length, heads, size = keys.shape
    each = jnp.broadcast_to(keys[:, None], (batch, length, *keys.shape[1:]))
    each = turn(each.reshape(-1, length, heads, size), -distance.reshape(-1, length))
    each = each.reshape(batch, length, length, heads, size)
    each = jnp.repeat(each, queries.shape[2] // heads, axis=3)
    values = jnp.repeat(values, queries.shape[2] // heads, axis=2)
    scores = jnp.einsum("bihd,bijhd->bhij", queries, each, precision="highest")
    scores = jnp.where(mask[:, None], scores * size**-0.5, -jnp.inf)
    # rows of the padding attend nothing
    weights = jnp.where(mask.any(-1)[:, None, :, None], jax.nn.softmax(scores, axis=-1), 0)
    weights = jnp.where(mask[:, None], weights, 0)
    return jnp.einsum("bhij,bjhd->bihd", weights, values, precision="highest")


@quick_jit
def turned_gradients(given, cotangent, mask, distance):
    """Naive values and gradients, compiled once for all masks."""
    output, pull = jax.vjp(lambda *heads: turned_attention(*heads, mask, distance), *given)
    return output, pull(cotangent)


@functools.partial(quick_jit, static_argnums=0)
def packed_gradients(attention, tokens, starts, given, cotangent):
    """Those of the attention's own sources."""
    positions = jnp.arange(tokens.shape[1]) - starts

    def ours(queries, keys, values):
        heads = Heads(turn(queries, positions), turn(keys, positions), values, turn)
        sources = attention.sources(attention.plan(tokens, starts), heads, 0)
        return range_attention(heads.queries, sources)[0]

    output, pull = jax.vjp(ours, *given)
    return output, pull(cotangent)


@settings(max_examples=12, deadline=None)
@given(
    attention=st.builds(
        SeparatorAttention,
        window=st.integers(1, 9),
        initial_tokens=st.integers(0, 4),
        initial_of=st.sampled_from(["document", "row"]),
        separators=st.none() | st.integers(1, 5),
        separator_ids=st.sets(st.integers(0, VOCABULARY - 1), max_size=40).map(tuple),
        interval=st.none() | st.integers(1, 9),
        positions=st.sampled_from(["absolute", "compact"]),
    ),
    begins=st.sets(st.integers(1, 23), max_size=3),
    padding=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_any_separators_windows_and_paddings(attention, begins, padding, seed):
    """Values and gradients of packed documents; the second row is padded on the left."""
    length, random = 24, np.random.default_rng(seed)
    tokens = random_tokens(2, length, seed)
    starts = documents(length, (0, *begins), (0, *begins))
    starts[1] = np.maximum(starts[1], padding)
    mask = naive_mask(attention, tokens, starts)
    age = np.arange(length)[:, None] - np.arange(length)
    distance = np.broadcast_to(age, mask.shape)
    if attention.positions == "compact":
        # entries attended after each one, up to the row
        distance = np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] - mask
    *given, cotangent = (
        random.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (2, 1, 1, 2)
    )
    cotangent *= mask.any(-1)[..., None, None]
    actual = packed_gradients(attention, tokens, starts, given, cotangent)
    expected = turned_gradients(given, cotangent, mask, distance)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(left))
        np.testing.assert_allclose(left, right, atol=5e-5, rtol=5e-5)


@attentions
def test_without_documents_a_row_is_attended_from_its_beginning(name):
    tokens = random_tokens(2, LENGTH)
    mask = naive_mask(ATTENTIONS[name], tokens, np.zeros_like(tokens))
    np.testing.assert_array_equal(counter(name, None, LENGTH)(tokens, None), mask)


@pytest.mark.parametrize(
    ("density", "window", "dense_layers", "percent"),
    [
        (0, 64, (), 6.43),
        (0.1152, 64, (), 17.21),
        (0.1152, 128, (), 22.48),
        (0.1152, 64, (0,), 24.11),
        (0.1152, 64, (0, -1), 31.01),
    ],
    ids=["StreamingLLM", "n=64", "n=128", "H", "H/T"],
)
def test_share_of_dense_attention_is_that_of_the_paper(density, window, dense_layers, percent):
    """SepLLM's Table 3, column Attn.(%): 12 layers, 2048 tokens, separators as dense as the Pile's.

    0.1152 is what the 17.21% imply; the other rows then follow.
    """
    length = 2048
    # evenly spread separators, with id 1
    tokens = np.diff(np.floor(np.arange(length + 1) * density))[None].astype(np.int32)
    config = small_config(
        layers=12,
        attention=SeparatorAttention(window=window, initial_tokens=3, separator_ids=(1,)),
        layer_attention={layer: DenseAttention() for layer in dense_layers},
    )
    entries = attended_entries(config, tokens, None)
    assert 100 * entries / (12 * (length + 1) / 2) == pytest.approx(percent, abs=0.02)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_a_bound_makes_the_cost_linear(positions):
    tokens = random_tokens(1, 4096)

    def entries(separators, length):
        attention = SeparatorAttention(
            window=16,
            initial_tokens=3,
            separators=separators,
            separator_ids=(1, 2),
            positions=positions,
        )
        config = small_config(layers=1, attention=attention)
        return attended_entries(config, tokens[:, :length], None)

    # all but the first tokens have the same number of entries
    assert 2 * 2048 * entries(8, 2048) == pytest.approx(4096 * entries(8, 4096), rel=0.02)
    assert entries(8, 4096) == pytest.approx(3 + 8 + 16, rel=0.02)
    # without one, separators are as many as there are
    assert entries(None, 4096) - 3 - 16 > 1.8 * (entries(None, 2048) - 3 - 16)


def test_all_of_them_are_attentions():
    assert all(isinstance(attention, Attention) for attention in ATTENTIONS.values())
    assert not isinstance(small_config(), Attention)
