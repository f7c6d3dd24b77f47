"""The Triton kernels of range attention under Triton's interpreter, against the reference."""

from __future__ import annotations

import dataclasses

# before any module of kernels
import triton_interpreter  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered_arrays import largest_array

from seqeff_kernels import gpu
from seqeff_kernels.range_attention import RangeSource, TokenSource, reference, triton
from seqeff_kernels.range_attention.shapes import Shape, separator_sources, tokens
from seqeff_kernels.range_attention.triton import Plan, Tiles

pytestmark = pytest.mark.parity

TOLERANCE = {"float32": 2e-6, "float16": 4e-3}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setattr(gpu, "triton_call", triton_interpreter.triton_call)
    monkeypatch.setattr(gpu, "triton_obstacle", lambda: None)


def tiles(full=True):
    sizes = ((16, 16), (16, 32), (16, 16), (32, 16))
    return Plan(*(Tiles(rows, entries, 4, 1, full) for rows, entries in sizes))


def separators(heads=2, kv_heads=2, documents=False, own=False, dtype="float32"):
    shape = Shape(batch=2, length=50, heads=heads, kv_heads=kv_heads, head_dim=24, window=9)
    queries, keys, values, chosen = tokens(shape, dtype=dtype)
    start = None
    if documents:
        start = jnp.broadcast_to(jnp.arange(50) // 23 * 23, (2, 50)).astype(jnp.int32)
    sources = separator_sources(keys, values, chosen, shape.window, start)
    if own:
        sources = (dataclasses.replace(sources[0], queries=queries[:, ::-1]), sources[1])
    return queries, sources


def random_bounds():
    batch, rows, kv_heads = 1, 50, 2
    generator = np.random.default_rng(0)
    queries = jnp.asarray(generator.normal(size=(batch, rows, 4, 16)), jnp.float32)
    sources = []
    for entries, lines in ((41, (batch, kv_heads, rows)), (70, (batch, rows))):
        start, end = np.sort(generator.integers(0, entries, (2, *lines)), axis=-1)
        entry = np.arange(entries)[:, None]
        attended = ((start[..., None, :] <= entry) & (entry < end[..., None, :])).any(-1)
        attended = attended.swapaxes(1, 2) if len(lines) == 3 else attended[..., None]
        keys, values = (
            np.where(
                attended[..., None], generator.normal(size=(batch, entries, kv_heads, 16)), np.nan
            )
            for _ in range(2)
        )
        sources.append(
            RangeSource(
                jnp.asarray(keys, jnp.float32),
                jnp.asarray(values, jnp.float32),
                jnp.asarray(start),
                jnp.asarray(end),
            )
        )
    keys, values = (
        jnp.asarray(generator.normal(size=(batch, 64, kv_heads, 16)), jnp.float32) for _ in range(2)
    )
    return queries, (*sources, TokenSource(keys, values, window=17, row_offset=7))


CASES = {
    "separators": separators,
    "grouped heads": lambda: separators(4, 2),
    "documents": lambda: separators(documents=True),
    "own queries": lambda: separators(own=True),
    "float16": lambda: separators(dtype="float16"),
    "three sources of random bounds, empty rows, NaN in no range": random_bounds,
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_references(name):
    queries, sources = CASES[name]()
    weights = jax.random.normal(jax.random.key(1), queries.shape)

    def run(attend, queries, sources):
        def loss(queries, sources):
            output, logsumexp = attend(queries, sources, 0.3)
            finite = jnp.where(jnp.isneginf(logsumexp), 0, jnp.sin(logsumexp))
            return (output.astype(jnp.float32) * weights).sum() + finite.sum(), (output, logsumexp)

        gradients, outputs = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(queries, sources)
        leaves = jax.tree.leaves((outputs, gradients))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]

    found = run(lambda *inputs: triton.attend(*inputs, tiles()), queries, sources)
    exact = run(reference.attend, queries, sources)
    for got, want in zip(found, exact, strict=True):
        compare(got, want, TOLERANCE[str(queries.dtype)])


def test_one_loop_for_all_tiles_gives_the_same():
    queries, sources = separators()
    one, two = (triton.attend(queries, sources, 0.3, tiles(full)) for full in (False, True))
    for got, want in zip(one, two, strict=True):
        compare(got, want, 2e-6)


@pytest.mark.parametrize("length", [1 << 17, 1 << 20])
def test_nothing_grows_with_the_square_of_the_length(length):
    """The largest array of forward and backward, between the kernels, is one of the tokens'.

    At the larger length, a table of tiles of rows and of entries would exceed it fourfold.
    """
    array = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float16)
    chosen = jax.ShapeDtypeStruct((1, length), bool)

    def loss(queries, keys, values, chosen):
        sources = separator_sources(keys, values, chosen, 64)
        return triton.attend(queries, sources, 0.1)[0].astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    assert largest_array(gradient.lower(array, array, array, chosen).as_text()) == length * 64


def test_packing_takes_rows_of_more_elements_than_32_bits_count(tmp_path):
    import torch

    from seqeff_kernels.range_attention import packing_kernels

    features, capacity, chosen = 1 << 20, 16, 4096
    # a sparse file: of it, one program touches two features of two tokens
    shape = (1, chosen + 1, features)
    tokens = np.memmap(tmp_path / "tokens", np.float16, "w+", shape=shape)
    tokens[0, 0, :2], tokens[0, chosen, :2] = -1, (1, 2)
    indices = np.full((1, capacity), chosen, np.int32)
    count = np.zeros((1, chosen + 1), np.int32)
    count[0, chosen] = 1
    packed = np.full((1, capacity, features), np.nan, np.float16)
    whole, few, *packing = map(torch.from_numpy, (tokens, packed, indices, count))
    sizes = {
        "TOKENS": chosen + 1,
        "CAPACITY": capacity,
        "FEATURES": features,
        "BLOCK_ENTRIES": capacity,
        "BLOCK_FEATURES": 2,
    }
    grid = (1, 1, 1)
    packing_kernels.gather[grid](whole, whole, *packing, few, few, **sizes, CLEARED=capacity)
    np.testing.assert_array_equal(packed[0, :2, :2], [[1, 2], [0, 0]])
    packing_kernels.add[grid](whole, whole, few, few, *packing, whole, whole, **sizes)
    np.testing.assert_array_equal(tokens[0, [0, chosen], :2], [[-1, -1], [2, 4]])


def compare(got, want, tolerance):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert np.isfinite(got[finite]).all()
    error = np.linalg.norm(got[finite] - want[finite]) / np.linalg.norm(want[finite])
    assert error < tolerance
