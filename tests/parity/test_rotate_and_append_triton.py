"""The Triton kernel, interpreted on the CPU: against the portable form, and in a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter
from flax import nnx

from seqeff.models import (
    CachedTransformer,
    DenseAttention,
    FeedForward,
    HeadProjections,
    Rotary,
    TransformerConfig,
    cached_parameters,
    empty_cache,
)
from seqeff.models.caches import entries
from seqeff_kernels.rotate_and_append import rotate_and_append, triton

pytestmark = pytest.mark.parity

TOLERANCE = {jnp.float32: 1e-6, jnp.float16: 1e-3}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "triton_call", triton_interpreter.triton_call)
    monkeypatch.setattr(triton, "triton_obstacle", lambda: None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("tokens_of_a_program", [1, 16])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "pairs", "interleaved"),
    [
        (1, 4, 2, 64, 8, False),
        (7, 5, 1, 80, 10, True),
        (3, 3, 3, 24, 12, False),
        (2, 2, 2, 16, 0, False),
    ],
)
def test_the_kernel_equals_the_portable_form(
    rows, heads, kv_heads, head_dim, pairs, interleaved, tokens_of_a_program, dtype, monkeypatch
):
    monkeypatch.setattr(triton, "_FEW_TOKENS", 0 if tokens_of_a_program > 1 else 1024)
    generator = np.random.default_rng(0)
    batch, capacity = 3, 11
    joined = generator.normal(size=(batch, rows, (heads + 2 * kv_heads) * head_dim + 5))
    cache = generator.normal(size=(2, batch, capacity, kv_heads, head_dim))
    cache[:, :, ::3] = np.nan
    joined, keys, values = (jnp.asarray(x, dtype) for x in (joined, *cache))
    slot = np.stack([generator.permutation(capacity)[:rows] for _ in range(batch)])
    slot[0, 0], slot[-1, -1] = capacity, -1
    angles = generator.normal(size=(batch, rows, pairs))
    rotation = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    one, other = (
        rotate_and_append(
            joined,
            keys,
            values,
            jnp.asarray(slot, jnp.int32),
            rotation if pairs else None,
            heads=heads,
            bias=jnp.linspace(-1, 1, joined.shape[2]).astype(dtype) if rows > 1 else None,
            interleaved=interleaved,
            backend=backend,
        )
        for backend in ("triton", "xla")
    )
    allowed = TOLERANCE[dtype]
    for found, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(found, expected, rtol=allowed, atol=allowed)


def test_a_model_decodes_alike_with_the_kernel(monkeypatch):
    config = TransformerConfig(
        vocabulary_size=31,
        width=32,
        layers=2,
        residual="parallel",
        projections=HeadProjections(heads=2),
        feed_forward=FeedForward(hidden=48),
        attention=DenseAttention(),
        positions=Rotary(fraction=0.5),
        dtype="float32",
    )
    parameters = nnx.to_pure_dict(nnx.split(config.make(nnx.Rngs(0)))[1])
    model = CachedTransformer.of(config, cached_parameters(config, parameters))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 6)), jnp.int32)
    parts = ((tokens[:, :4], [4, 3]), (tokens[:, 4:5], [1, 1]), (tokens[:, 5:], [0, 1]))
    found, calls = {}, []
    kernel = triton.rotate_and_append

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(triton, "rotate_and_append", counted)
    for taken in ("xla", "triton"):
        monkeypatch.setattr(entries, "automatic", lambda *_, taken=taken: taken)
        cache, hidden = empty_cache(config, 2, 8), []
        for part, count in parts:
            states, cache = model.extend(part, cache, jnp.asarray(count, jnp.int32))
            hidden.append(states)
        found[taken] = jax.tree.leaves((hidden, cache))
        assert len(calls) == (len(parts) * config.layers if taken == "triton" else 0)
    for one, other in zip(found["xla"], found["triton"], strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
