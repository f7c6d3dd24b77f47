"""range_attention against torch's scaled_dot_product_attention with explicit masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels.range_attention import TokenSource, range_attention
from seqeff_kernels.range_attention.shapes import separator_sources

pytestmark = pytest.mark.parity

INITIAL, WINDOW = 3, 17


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads", "length"),
    [
        ("dense", 4, 4, 63),
        ("packed", 4, 2, 129),
        ("window", 3, 1, 129),
        ("separators", 4, 2, 129),
        ("packed separators", 2, 2, 63),
    ],
)
def test_outputs_and_gradients_are_theirs(backend, kind, heads, kv_heads, length):
    torch = pytest.importorskip("torch")
    random, batch, head_dim = np.random.default_rng(0), 2, 16
    queries, keys, values, cotangent = (
        random.normal(size=(batch, length, count, head_dim)).astype(np.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    token = np.arange(length)
    starts = np.where(token < length // 3, 0, length // 3)
    starts = np.stack([starts, np.where(token < length - 1, starts, length - 1)]).astype(np.int32)
    if "packed" not in kind:
        starts = np.zeros_like(starts)
    chosen = (token - starts < INITIAL) | (random.random((batch, length)) < 0.12)

    causal = (token[:, None] >= token) & (token >= starts[..., None])
    recent = token[:, None] - token < WINDOW
    mask = {
        "dense": causal,
        "packed": causal,
        "window": causal & recent,
        "separators": causal & (recent | chosen[:, None]),
        "packed separators": causal & (recent | chosen[:, None]),
    }[kind]

    def sources(keys, values):
        document_start = jnp.asarray(starts) if "packed" in kind else None
        if "separators" in kind:
            return separator_sources(keys, values, jnp.asarray(chosen), WINDOW, document_start)
        return (TokenSource(keys, values, document_start, WINDOW if kind == "window" else None),)

    @jax.jit
    def ours(queries, keys, values):
        def attend(queries, keys, values):
            return range_attention(queries, sources(keys, values), backend=backend)[0]

        output, pull = jax.vjp(attend, queries, keys, values)
        return output, *pull(cotangent)

    # torch keeps [batch, heads, length, head_dim]
    tensors = [
        torch.tensor(np.swapaxes(array, 1, 2), requires_grad=True)
        for array in (queries, keys, values)
    ]
    output = torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=torch.tensor(mask[:, None]), enable_gqa=True
    )
    output.backward(torch.tensor(np.swapaxes(cotangent, 1, 2)))
    expected = [output.detach(), *(tensor.grad for tensor in tensors)]
    for left, right in zip(ours(queries, keys, values), expected, strict=True):
        np.testing.assert_allclose(left, np.swapaxes(right.numpy(), 1, 2), atol=2e-5, rtol=1e-4)
