"""The reference against softmax over dense masks written from the definitions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels import RangeSource, TokenSource, range_attention
from seqeff_kernels.range_attention.shapes import separator_sources


@functools.partial(jax.jit, static_argnames="scale")
def reference(queries, sources, scale=None):
    return range_attention(queries, sources, scale=scale, backend="reference")


def listed_mask(source):
    entry = np.arange(source.keys.shape[1])
    start, end = (np.asarray(b) for b in (source.start, source.end))
    start, end = (b[:, None] if b.ndim == 2 else b for b in (start, end))
    return (start[..., None] <= entry) & (entry < end[..., None])


@pytest.mark.parametrize(
    "entries, kv_heads, options",
    [
        ((63,), 1, {"per_kv_head": True}),
        ((20, 63), 2, {"per_kv_head": True, "own_queries": True}),
        ((1, 30, 17), 4, {"own_queries": True}),
    ],
)
def test_equals_softmax_over_the_union_of_ranges(call, oracle, entries, kv_heads, options):
    for seed in range(3):
        queries, sources = call(
            seed, rows=17, kv_heads=kv_heads, entries=entries, poison=True, **options
        )
        output, logsumexp = reference(queries, sources, scale=0.3)
        masks = [listed_mask(source) for source in sources]
        expected_output, expected_logsumexp = oracle(queries, sources, masks, 0.3)
        np.testing.assert_allclose(output, expected_output, atol=1e-5)
        np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=1e-5)


def test_empty_rows_give_zero_minus_infinity_and_no_gradient(call):
    queries, (source,) = call(0, rows=5, entries=(9,))
    start, end = np.array([[0, 1, 2, 4, 9]] * 2), np.array([[0, 3, 2, 3, 9]] * 2)
    source = RangeSource(source.keys, source.values, start, end)

    def loss(queries, source):
        output, logsumexp = reference(queries, [source])
        return output.sum() + jnp.where(jnp.isfinite(logsumexp), logsumexp, 0).sum()

    output, logsumexp = reference(queries, [source])
    empty = [0, 2, 3, 4]
    assert np.all(np.asarray(output)[:, empty] == 0) and np.all(np.asarray(output)[:, 1] != 0)
    assert np.all(np.asarray(logsumexp)[:, empty] == -np.inf)
    queries_gradient, source_gradient = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(
        queries, source
    )
    assert np.all(np.asarray(queries_gradient)[:, empty] == 0)
    assert np.all(np.asarray(queries_gradient)[:, 1] != 0)
    for gradient in (source_gradient.keys, source_gradient.values):
        assert np.all(np.asarray(gradient)[:, 3:] == 0) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_tokens_are_causal_within_window_and_document(call, oracle, window, documents):
    queries, (source,) = call(1, rows=23, entries=(23,))
    document_start = (
        np.array([[0] * 6 + [6] * 10 + [16] * 7, [0] * 22 + [22]]) if documents else None
    )
    tokens = TokenSource(source.keys, source.values, document_start, window)
    row, entry = np.arange(23)[:, None], np.arange(23)
    mask = (entry <= row) & (row - entry < (window or 23))
    mask = np.broadcast_to(mask, (2, 1, 23, 23))
    if document_start is not None:
        mask = mask & (document_start[:, None, :, None] == document_start[:, None, None, :])
    expected, _ = oracle(queries, (tokens,), [mask], 8**-0.5)
    np.testing.assert_allclose(reference(queries, [tokens])[0], expected, atol=1e-5)


@pytest.mark.parametrize("offset", [19, np.int32(19), np.array([19, 4])])
def test_rows_may_be_a_part_of_the_tokens(call, offset):
    queries, (source,) = call(2, rows=23, entries=(23,))
    whole = reference(queries, [TokenSource(source.keys, source.values, window=7)])[0]
    offsets = np.broadcast_to(offset, 2)
    part = np.stack([queries[b, o : o + 3] for b, o in enumerate(offsets)])
    tokens = TokenSource(source.keys, source.values, window=7, row_offset=offset)
    expected = np.stack([whole[b, o : o + 3] for b, o in enumerate(offsets)])
    np.testing.assert_allclose(reference(part, [tokens])[0], expected, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
def test_separator_attention_equals_its_definition_in_place(call, oracle, documents):
    length, window = 40, 6
    queries, (source,) = call(3, rows=length, entries=(length,))
    chosen = np.random.default_rng(0).random((2, length)) < 0.3
    chosen[:, :2] = True
    starts = np.array([[0] * 13 + [13] * 27, [0] * 39 + [39]]) if documents else None
    sources = separator_sources(
        jnp.asarray(source.keys),
        jnp.asarray(source.values),
        jnp.asarray(chosen),
        window,
        None if starts is None else jnp.asarray(starts),
    )
    row, entry = np.arange(length)[:, None], np.arange(length)
    mask = (entry <= row) & ((row - entry < window) | chosen[:, None, None, :])
    if starts is not None:
        mask &= starts[:, None, :, None] == starts[:, None, None, :]
    in_place = RangeSource(source.keys, source.values, source.start, source.end)
    expected, _ = oracle(queries, (in_place,), [mask], 8**-0.5)
    np.testing.assert_allclose(reference(queries, sources)[0], expected, atol=1e-5)
