"""Rotating new queries and keys and writing entries into a cache, token by token in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels import gpu
from seqeff_kernels.rotate_and_append import automatic, explain, rotate_and_append, triton

# batch, rows, heads, KV heads, head size, pairs, interleaved, columns beyond
SHAPES = {
    "one token": (3, 1, 4, 2, 16, 4, False, 7),
    "whole heads, interleaved": (2, 3, 5, 1, 10, 5, True, 0),
    "part, interleaved": (1, 5, 2, 2, 12, 2, True, 3),
    "nothing rotated": (2, 2, 3, 3, 6, 0, False, 1),
}
CAPACITY = 9


def call(shape):
    """Arguments of a call with a poisoned cache, and some slots that are not to be written."""
    batch, rows, heads, kv_heads, head_dim, pairs, _, beyond = shape
    generator = np.random.default_rng(0)
    columns = (heads + 2 * kv_heads) * head_dim + beyond
    joined = generator.normal(size=(batch, rows, columns))
    joined[..., columns - beyond :] = np.nan
    cache = np.full((2, batch, CAPACITY, kv_heads, head_dim), np.nan)
    cache[:, :, ::2] = generator.normal(size=cache[:, :, ::2].shape)
    slot = np.stack([generator.permutation(CAPACITY)[:rows] for _ in range(batch)])
    slot[0, 0], slot[-1, -1] = CAPACITY + 3, -1
    angles = generator.normal(size=(batch, rows, pairs))
    rotation = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    joined, keys, values = (jnp.asarray(x, jnp.float32) for x in (joined, *cache))
    return joined, keys, values, jnp.asarray(slot, jnp.int32), rotation if pairs else None


def expected(shape, joined, keys, values, slot, rotation):
    batch, rows, heads, kv_heads, head_dim, pairs, interleaved, _ = shape
    joined, keys, values = (np.array(x, np.float64) for x in (joined, keys, values))
    queries = np.zeros((batch, rows, heads, head_dim))
    for b in range(batch):
        for r in range(rows):
            vectors = joined[b, r, : (heads + 2 * kv_heads) * head_dim].reshape(-1, head_dim)
            for vector in vectors[: heads + kv_heads]:
                for pair in range(pairs):
                    places = [2 * pair, 2 * pair + 1] if interleaved else [pair, pair + pairs]
                    cosine, sine = (float(x[b, r, pair]) for x in rotation)
                    first, second = vector[places]
                    vector[places] = first * cosine - second * sine, second * cosine + first * sine
            queries[b, r] = vectors[:heads]
            if 0 <= slot[b, r] < CAPACITY:
                keys[b, slot[b, r]] = vectors[heads : heads + kv_heads]
                values[b, slot[b, r]] = vectors[heads + kv_heads :]
    return queries, keys, values


@pytest.mark.parametrize("name", SHAPES)
def test_the_portable_form(name):
    shape = SHAPES[name]
    arguments = call(shape)
    joined, *others = arguments
    bias = jnp.linspace(-1, 1, joined.shape[2])
    found = rotate_and_append(
        joined - bias, *others, heads=shape[2], bias=bias, interleaved=shape[6], backend="xla"
    )
    for one, other in zip(found, expected(shape, *arguments), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_it_takes_the_portable_form_without_a_gpu():
    joined, keys, *_ = call(SHAPES["one token"])
    assert automatic(joined, keys) == "xla"
    answers = explain(joined, keys)
    assert answers["auto"] == "takes xla"
    assert answers["xla"] == "available"
    assert "CUDA" in answers["triton"]
    with pytest.raises(ValueError, match="backend 'triton' cannot append to this cache: it needs"):
        rotate_and_append(*call(SHAPES["one token"]), heads=4, backend="triton")


def test_the_kernel_is_taken_where_it_was_checked(monkeypatch):
    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "TESTED_JAX", jax.__version__)
    monkeypatch.setattr(triton, "triton_obstacle", lambda: None)

    def taken(dtype, head_dim):
        like = jax.ShapeDtypeStruct((2, 64, 1, head_dim), dtype)
        return automatic(jax.ShapeDtypeStruct((2, 1, 4096), dtype), like)

    assert taken(jnp.bfloat16, 64) == "triton"
    assert taken(jnp.float32, 64) == taken(jnp.bfloat16, 48) == "xla"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 9}, "heads is 9; give a multiple of the cache's 2 KV heads"),
        ({"heads": 10}, "10 heads and 2 KV heads of 16 in a batch of 3 need"),
        ({"slot": jnp.zeros((3, 2), jnp.int32)}, r"slot has shape \(3, 2\); give \(3, 1\)"),
        ({"values": jnp.zeros((3, 8, 2, 16))}, r"give \(batch, rows, columns\) and twice"),
        ({"keys": jnp.zeros((3, 9, 2, 16), jnp.float16)}, "keys are float16"),
        ({"rotation": (jnp.zeros((3, 1, 9)),) * 2}, "rotation has 9 pairs; a head has 8"),
        ({"rotation": (jnp.zeros((3, 1, 4)), jnp.zeros((3, 1)))}, "rotation has shapes"),
        ({"bias": jnp.zeros(4)}, r"bias has shape \(4,\) and dtype float32; give \(135,\)"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    names = ("joined", "keys", "values", "slot", "rotation")
    arguments = dict(zip(names, call(SHAPES["one token"]), strict=True)) | {"heads": 4}
    with pytest.raises(ValueError, match=message):
        rotate_and_append(**(arguments | changes))
