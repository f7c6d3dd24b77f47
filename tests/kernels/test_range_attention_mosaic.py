"""The Mosaic kernels without a GPU: lowered for Hopper, and interpreted with plain products."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered_arrays import largest_array
from mosaic_interpreter import interpreted, lowered, needs_mosaic, shared_memory

from seqeff_kernels.range_attention import mosaic, reference
from seqeff_kernels.range_attention.shapes import Shape, separator_sources, tokens
from seqeff_kernels.range_attention.sources import RangeSource, TokenSource


def test_obstacles_say_what_is_wrong():
    queries = jnp.zeros((1, 64, 2, 80), jnp.bfloat16)
    source = TokenSource(queries, queries)
    if jax.__version_info__ < (0, 11):
        assert "jax 0.11" in mosaic.obstacle(queries, (source,))
        return
    assert "head_dim" in mosaic.obstacle(queries, (source,))
    queries = jnp.zeros((1, 64, 2, 64), jnp.float32)
    assert "float32" in mosaic.obstacle(queries, (TokenSource(queries, queries),))
    queries = queries.astype(jnp.bfloat16)
    source = TokenSource(queries, queries)
    assert "up to 3 sources" in mosaic.obstacle(queries, (source,) * 4)
    assert "compute capability 9.0" in mosaic.obstacle(queries, (source,))


def test_turns_need_two_buffers():
    with pytest.raises(ValueError, match="take_turns=False or buffers=2"):
        mosaic.Tiles(buffers=1)
    for tiles in (mosaic.Tiles(buffers=1, take_turns=False), mosaic.Tiles(buffers=1, workers=3)):
        assert mosaic.Plan((0,), (), 1.0, tiles).for_gradients().tiles.workers == 2


@pytest.fixture
def plain_products(monkeypatch):
    with interpreted(monkeypatch):
        yield


def separators(length, heads, kv_heads, window, density=0.4):
    shape = Shape(
        batch=1,
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        window=window,
        density=density,
    )
    queries, keys, values, chosen = tokens(shape, dtype=jnp.bfloat16)
    return queries, separator_sources(keys, values, chosen, window)


def two_documents():
    queries, (far, near) = separators(128, 1, 1, 30)
    start = jnp.where(jnp.arange(128) < 50, 0, 50)[None]
    chosen = jnp.diff(far.packed.count, prepend=0) > 0
    return queries, separator_sources(near.keys, near.values, chosen, 30, start)


def random_bounds(batch=2, length=128):
    queries, keys, values, _ = tokens(
        Shape(batch=batch, length=length, heads=2, kv_heads=2, head_dim=64), dtype=jnp.bfloat16
    )
    most = 150 * length // 128
    bounds = np.sort(np.random.default_rng(0).integers(0, most, (2, batch, 2, length)), axis=-1)
    start, end = jnp.asarray(np.minimum(bounds, length), jnp.int32)
    own = queries[:, ::-1]

    def earlier(bound, steps):
        return jnp.maximum(bound - steps, 0)

    return queries, (
        RangeSource(keys, values, start, end, queries=own),
        RangeSource(values, keys, earlier(start, 40)[:, 0], earlier(end, 30)[:, 0]),
    )


CASES = {
    "window": lambda: separators(256, 1, 1, 64),
    "grouped": lambda: separators(200, 2, 1, 7),
    "documents": two_documents,
    "own queries and empty rows": random_bounds,
}
TILES = {"two workers": mosaic.Tiles(), "three": mosaic.Tiles(workers=3, block_entries=64)}


@needs_mosaic
def test_interpreted_kernels_equal_the_reference(plain_products):
    check(separators(75, 1, 1, 20), mosaic.Tiles(block_entries=64))


@needs_mosaic
def test_interpreted_kernels_take_own_queries_and_bounds_of_each_head(plain_products):
    check(random_bounds(1, 70), mosaic.Tiles(block_entries=64))


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tiles", TILES)
def test_interpreted_kernels_equal_the_reference_widely(case, tiles, plain_products):
    check(CASES[case](), TILES[tiles])


@needs_mosaic
@pytest.mark.timeout(120, method="thread")
def test_blocks_of_rows_without_tiles_end(monkeypatch):
    queries, keys, values, _ = tokens(
        Shape(batch=2, length=256, heads=1, kv_heads=1, head_dim=64), dtype=jnp.bfloat16
    )
    # the first block's rows are padding
    source = TokenSource(keys, values, jnp.full((2, 256), 128, jnp.int32), 64)
    tiles = mosaic.Tiles(block_entries=64)
    assert tiles.take_turns
    with interpreted(monkeypatch, multiprocessors=1):
        found = jax.block_until_ready(mosaic.attend(queries, (source,), 0.1, tiles))
    for got, want in zip(found, reference.attend(queries, (source,), 0.1), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)


def padded_documents():
    """Two documents in one row of the batch; padding that fills a program's rows in the other."""
    length, window = 160, 20
    queries, keys, values, chosen = tokens(
        Shape(batch=2, length=length, heads=2, kv_heads=1, head_dim=64, density=0.3),
        dtype=jnp.bfloat16,
    )
    token = jnp.arange(length)
    start = jnp.stack([jnp.where(token < 50, 0, 50), jnp.full(length, 130)])
    return queries, separator_sources(
        keys, values, chosen & (token >= start), window, start.astype(jnp.int32)
    )


@needs_mosaic
@pytest.mark.timeout(300, method="thread")
def test_a_program_does_several_items(monkeypatch):
    with interpreted(monkeypatch, multiprocessors=1):
        check(padded_documents(), mosaic.Tiles(block_entries=64))


@needs_mosaic
def test_chosen_tokens_that_no_row_attends_have_no_gradient(plain_products):
    queries, (far, near) = separators(128, 1, 1, 64, density=1.0)
    # the last 64 entries are those of a program that no row visits
    assert far.end.max() == 64 and far.packed.count.max() == 128
    check((queries, (far, near)), mosaic.Tiles(workers=1, backward_workers=1))


def check(case, tiles):
    queries, sources = case

    def loss(attend, queries, sources):
        output, logsumexp = attend(queries, sources, 0.1)
        logsumexp = jnp.where(jnp.isneginf(logsumexp), 0, logsumexp)
        return (jnp.sin(output.astype(jnp.float32)).sum() + jnp.cos(logsumexp).sum()), (
            output,
            logsumexp,
        )

    def run(attend):
        gradient = jax.value_and_grad(loss, argnums=(1, 2), has_aux=True, allow_int=True)
        (_, outputs), gradients = gradient(attend, queries, sources)
        floats = [g for g in jax.tree.leaves(gradients) if g.dtype == jnp.bfloat16]
        return outputs, floats

    outputs, gradients = run(functools.partial(mosaic.attend, tiles=tiles))
    expected, expected_gradients = run(reference.attend)
    for got, want in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
    for got, want in zip(gradients, expected_gradients, strict=True):
        scale = np.abs(np.asarray(want, np.float32)).max()
        error = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max()
        assert error <= 2e-2 * scale


@needs_mosaic
@pytest.mark.parametrize("length", [1 << 17, 1 << 20])
def test_nothing_grows_with_the_square_of_the_length(length):
    """The largest array of forward and backward, between the kernels, is one of the tokens'.

    At the larger length, a table of tiles of rows and of entries would exceed it fourfold.
    """
    array = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
    chosen = jax.ShapeDtypeStruct((1, length), bool)

    def loss(queries, keys, values, chosen):
        sources = separator_sources(keys, values, chosen, 64)
        return mosaic.attend(queries, sources, 0.1)[0].astype(jnp.float32).sum()

    text = lowered(jax.grad(loss, argnums=(0, 1, 2)), array, array, array, chosen)
    assert largest_array(text) == length * 64


@needs_mosaic
@pytest.mark.parametrize(
    ("distinct", "head_dim", "dtype"),
    [
        *itertools.product((1, 2, 3), mosaic.HEAD_DIMS, [jnp.bfloat16]),
        (2, 64, jnp.float16),
    ],
)
def test_forward_and_backward_lower_for_hopper(distinct, head_dim, dtype):
    array = jax.ShapeDtypeStruct((2, 1000, 4, head_dim), dtype)
    entry = jax.ShapeDtypeStruct((2, 1000, 2, head_dim), dtype)
    bound = jax.ShapeDtypeStruct((2, 1000), jnp.int32)

    def loss(queries, keys, values, start, end):
        second, third = (*queries, *queries[:1] * 2)[1:3]
        sources = (
            TokenSource(keys, values, window=64),
            RangeSource(keys, values, start, end, queries=second),
            RangeSource(values, keys, start, end, queries=third),
        )
        output, logsumexp = mosaic.attend(queries[0], sources, 0.1)
        return output.astype(jnp.float32).sum() + logsumexp.sum()

    arguments = ((array,) * distinct, entry, entry, bound, bound)
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    assert lowered(gradient, *arguments).count("@mosaic_gpu_v2") == 1 + distinct + 3
    tiles = mosaic.Tiles().fitted(head_dim, distinct, 3)
    assert shared_memory(loss, *arguments) == tiles.shared_memory(head_dim, distinct, 3)


@needs_mosaic
@pytest.mark.parametrize("finite", [True, False])
def test_a_cache_that_is_finite_is_not_copied(finite):
    queries = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    cached = jax.ShapeDtypeStruct((2, 1000, 4, 64), jnp.bfloat16)
    length = jax.ShapeDtypeStruct((2,), jnp.int32)

    def attend(queries, keys, values, length):
        source = TokenSource(keys, values, row_offset=length, finite=finite)
        return mosaic.attend(queries, (source,), 0.1)[0]

    copies = re.findall(
        r"stablehlo\.(?:select|pad)\b.*tensor<2x\d+x4x64xbf16>",
        lowered(attend, queries, cached, cached, length),
    )
    assert bool(copies) != finite


@pytest.mark.parametrize(
    ("distinct", "head_dim", "changes"),
    [
        (1, 128, {}),
        (3, 64, {}),
        (2, 128, {"buffers": 1, "take_turns": False}),
        (3, 128, {"buffers": 1, "take_turns": False, "block_entries": 64}),
    ],
)
def test_plans_are_cut_to_the_shared_memory(distinct, head_dim, changes):
    tiles = mosaic.Tiles()
    assert tiles.fitted(head_dim, distinct, 3) == dataclasses.replace(tiles, **changes)
