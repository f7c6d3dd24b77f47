"""Choice of a backend, its explanations, and the messages for calls that cannot be."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqeff_kernels import RangeSource, TokenSource, gpu, range_attention, tuning
from seqeff_kernels.range_attention import automatic, cudnn, explain, mosaic, triton, xla
from seqeff_kernels.range_attention.shapes import Shape, tokens

SHAPE = Shape(batch=2, length=40, heads=4, kv_heads=2, head_dim=16)


@pytest.fixture
def arrays():
    return tokens(SHAPE, dtype=jnp.bfloat16)[:3]


@pytest.fixture
def hopper(monkeypatch):
    """A machine that looks like one with a Hopper GPU, and a list of the fused calls made.

    As cuDNN's, the gradient of the stand-in leaves the logsumexp out.
    """
    calls = []

    def dot_product_attention(
        queries, keys, values, *, scale, mask_type, sliding_window_length, return_residual
    ):
        assert mask_type.name == "CAUSAL" and return_residual

        @jax.custom_vjp
        def fused(*arrays):
            source = TokenSource(*arrays[1:], window=sliding_window_length)
            output, logsumexp = xla.attend(arrays[0], (source,), scale)
            return output, jnp.swapaxes(logsumexp, 1, 2)

        def backward(pullback, gradients):
            calls.append("backward")
            return pullback((gradients[0], jnp.zeros_like(gradients[1])))

        fused.defvjp(lambda *arrays: jax.vjp(fused.fun, *arrays), backward)
        calls.append(f"forward, window {sliding_window_length}")
        return fused(queries, keys, values)

    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "TESTED_JAX", jax.__version__)
    monkeypatch.setattr(cudnn, "cuda_versions", object())
    monkeypatch.setattr(cudnn, "TESTED", {(16, "bfloat16")})
    monkeypatch.setattr(
        cudnn.fused_attention_stablehlo, "dot_product_attention", dot_product_attention
    )
    return calls


def test_every_backend_says_whether_it_is_available(arrays):
    queries, keys, values = arrays
    reasons = explain(queries, [TokenSource(keys, values)])
    assert reasons["reference"] == reasons["xla"] == "available"
    assert "CUDA" in reasons["cudnn"]
    assert reasons["auto"].startswith(
        "takes xla: no kernel can serve: cudnn (it needs a CUDA device"
    )
    assert all(reasons[name] in reasons["auto"] for name in ("cudnn", "mosaic", "triton"))
    with pytest.raises(ValueError, match=r"cudnn.*CUDA"):
        range_attention(queries, [TokenSource(keys, values)], backend="cudnn")


@pytest.mark.parametrize("window, passed", [(None, None), (7, 7), (40, None)])
def test_auto_takes_cudnn_for_causal_attention_and_windows(arrays, hopper, window, passed):
    queries, keys, values = arrays
    sources = [TokenSource(keys, values, window=window)]
    output, logsumexp = jax.jit(range_attention)(queries, sources)
    assert hopper == [f"forward, window {passed}"]
    assert logsumexp.dtype == jnp.float32
    expected = jax.jit(range_attention, static_argnames="backend")(
        queries, sources, backend="reference"
    )
    for got, wanted in zip((output, logsumexp), expected, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), atol=2e-2)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"document_start": jnp.zeros((2, 40), jnp.int32)}, "documents"),
        ({"row_offset": 1}, "from the first"),
        ({"row_offset": jnp.int32(0)}, "from the first"),
        ({"keys": jnp.zeros((2, 41, 2, 16), jnp.bfloat16)}, "all the tokens"),
        ({"values": jnp.zeros((2, 40, 2, 16), jnp.float32)}, "bfloat16 or float16"),
    ],
)
def test_auto_leaves_to_the_portable_form_what_cudnn_cannot_do(arrays, hopper, change, reason):
    queries, keys, values = arrays
    if "keys" in change:
        change = {"values": change["keys"]} | change
    source = dataclasses.replace(TokenSource(keys, values), **change)
    assert reason in explain(queries, [source])["cudnn"]
    jax.eval_shape(range_attention, queries, [source])
    assert hopper == []


def test_auto_takes_only_head_sizes_that_are_tested_on_a_gpu(arrays, hopper, monkeypatch):
    queries, keys, values = arrays
    assert explain(queries, [TokenSource(keys, values)])["auto"] == "takes cudnn"
    monkeypatch.setattr(cudnn, "TESTED", {(64, "bfloat16")})
    jax.eval_shape(range_attention, queries, [TokenSource(keys, values)])
    assert hopper == []
    answers = explain(queries, [TokenSource(keys, values)])
    assert answers["cudnn"] == "available"
    assert answers["auto"].startswith("takes xla: cudnn")
    assert "do not cover head_dim 16 in bfloat16 on compute capability 9.0" in answers["auto"]


def test_auto_takes_what_the_table_lists_as_faster(hopper, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    path = tuning.table_path(jax.devices()[0].device_kind)
    monkeypatch.setattr(cudnn, "TESTED", {(64, "bfloat16")})
    monkeypatch.setattr(mosaic, "obstacle", lambda *_: None)
    monkeypatch.setattr(triton, "obstacle", lambda *_: None)
    queries = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.bfloat16)

    def source(window, **changes):
        return TokenSource(queries, queries, window=window, **changes)

    def record(backend, plan, times):
        for window, time in times.items():
            entry = {"plan": plan, "milliseconds": {"forward": 0.5, "training": time}}
            key = tuning.attention_key(queries, [source(window)])
            assert f" {'causal' if window is None else 'window64'} rows=4096" in key
            tuning.record(path, "attention", backend, key, entry)

    # it lists nothing, then all but the first, then all
    assert automatic(queries, [source(None)]) == automatic(queries, [source(64)]) == "cudnn"
    record("mosaic", dataclasses.asdict(mosaic.Tiles()), {None: 2.0, 64: 1.0})
    record("triton", dataclasses.asdict(triton.plan(64, "bfloat16")), {None: 4.0, 64: 2.0})
    assert automatic(queries, [source(None)]) == automatic(queries, [source(64)]) == "cudnn"
    record("cudnn", {}, {None: 1.0, 64: 3.0})
    assert automatic(queries, [source(None)]) == "cudnn"
    assert automatic(queries, [source(64)]) == automatic(queries, [source(50)]) == "mosaic"
    # what cuDNN cannot do goes to the faster of the others, whatever the table says of cuDNN
    documents = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    assert automatic(queries, [source(None, document_start=documents)]) == "mosaic"


def test_cudnn_refuses_an_odd_number_of_rows(hopper):
    like = jax.ShapeDtypeStruct((1, 777, 2, 64), jnp.bfloat16)
    assert "even number of rows" in explain(like, [TokenSource(like, like)])["cudnn"]


def test_cudnn_needs_one_token_source_and_a_head_size_it_knows(arrays, hopper, monkeypatch):
    queries, keys, values = arrays
    listed = RangeSource(keys, values, *[jnp.zeros((2, 40), jnp.int32)] * 2)
    for sources in ([listed], [TokenSource(keys, values), listed]):
        assert "one TokenSource" in explain(queries, sources)["cudnn"]
    for head_dim, capability, serves in (
        (12, (9, 0), False),
        (256, (9, 0), True),
        (264, (9, 0), False),
        (256, (8, 0), False),
    ):
        monkeypatch.setattr(gpu, "compute_capability", lambda c=capability: c)
        like = jax.ShapeDtypeStruct((1, 8, 2, head_dim), jnp.bfloat16)
        answer = explain(like, [TokenSource(like, like)])["cudnn"]
        assert (answer == "available") == serves


@pytest.mark.parametrize("uses_logsumexp", [False, True])
def test_cudnn_gradients_with_and_without_logsumexp(arrays, hopper, uses_logsumexp):
    arrays = [x.astype(jnp.float16) for x in arrays]

    def gradients(backend):
        @jax.jit
        def attend(queries, keys, values):
            return range_attention(queries, [TokenSource(keys, values, window=9)], backend=backend)

        def loss(*arrays):
            output, logsumexp = attend(*arrays)
            total = (output.astype(jnp.float32) ** 2).sum()
            return total + (logsumexp**2).sum() if uses_logsumexp else total

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    got = gradients("cudnn")
    assert ("backward" in hopper) == (not uses_logsumexp)
    for one, other in zip(got, gradients("reference"), strict=True):
        np.testing.assert_allclose(
            one.astype(jnp.float32), other.astype(jnp.float32), atol=2e-2, rtol=2e-2
        )


def test_cudnn_is_not_given_the_logsumexp_gradient_inside_scan(arrays, hopper):
    queries, keys, values = arrays

    def loss(x):
        def layer(x, _):
            return x + range_attention(x, [TokenSource(keys, values)], backend="cudnn")[0], None

        return jax.lax.scan(jax.checkpoint(layer), x, length=3)[0].astype(jnp.float32).sum()

    assert np.all(np.isfinite(jax.jit(jax.grad(loss))(queries)))
    assert "backward" in hopper


@pytest.mark.parametrize(
    "sources, message",
    [
        (lambda k, v: [], "at least one source"),
        (lambda k, v: [TokenSource(k, v[:, :-1])], r"sources\[0\].keys and values"),
        (lambda k, v: [TokenSource(k[:1], v[:1])], "batch is 2"),
        (lambda k, v: [TokenSource(k[..., :8], v[..., :8])], "head_dim 16"),
        (lambda k, v: [TokenSource(k[:, :0], v[:, :0])], "no entries"),
        (lambda k, v: [TokenSource(k[:, :9], v[:, :9])], "9 tokens for 40 rows"),
        (lambda k, v: [TokenSource(k, v, window=0)], "window is 0"),
        (lambda k, v: [TokenSource(k, v, window="64")], "window is '64'; give an int"),
        (lambda k, v: [TokenSource(k, v, window=1.5)], "window is 1.5; give an int"),
        (lambda k, v: TokenSource(k, v), "sources is a TokenSource; give a list"),
        (lambda k, v: [TokenSource(k, v, jnp.zeros((2, 39), int))], "document_start has shape"),
        (lambda k, v: [TokenSource(k, v, jnp.zeros((2, 40)))], "document_start.*float32"),
        (lambda k, v: [TokenSource(k, v, [0] * 40)], "document_start is a list; give an array"),
        (lambda k, v: [TokenSource(k, v, row_offset=jnp.zeros(3, int))], "row_offset has shape"),
        (lambda k, v: [TokenSource(k, v, queries=k)], "queries has shape"),
        (lambda k, v: [TokenSource(*[jnp.zeros((2, 40, 3, 16))] * 2)], "do not divide"),
        (lambda k, v: [TokenSource(k, v), TokenSource(k[:, :, :1], v[:, :, :1])], "KV heads"),
        (lambda k, v: [RangeSource(k, v, *[jnp.zeros((2, 4, 40), int)] * 2)], "start has shape"),
    ],
)
def test_what_does_not_fit_is_named(arrays, sources, message):
    queries, keys, values = arrays
    with pytest.raises(ValueError, match=message):
        range_attention(queries, sources(keys, values))


def test_unknown_backend(arrays):
    queries, keys, values = arrays
    with pytest.raises(ValueError, match="'flash' is unknown; give auto"):
        range_attention(queries, [TokenSource(keys, values)], backend="flash")


@pytest.mark.parametrize("scale", [0, -0.5, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(arrays, scale):
    queries, keys, values = arrays
    with pytest.raises(ValueError, match="give a positive number"):
        range_attention(queries, [TokenSource(keys, values)], scale=scale)


@pytest.mark.parametrize(
    "serve, tested, taken",
    [
        ((), (), "xla"),
        (("mosaic", "triton"), (), "xla"),
        (("mosaic", "triton"), ("cudnn", "triton"), "triton"),
        (("mosaic", "triton"), ("mosaic", "triton"), "mosaic"),
        (("cudnn", "mosaic", "triton"), ("cudnn", "mosaic", "triton"), "cudnn"),
    ],
)
def test_auto_takes_the_first_kernel_that_serves_and_is_tested(
    arrays, monkeypatch, serve, tested, taken
):
    queries, keys, values = arrays
    size = queries.shape[-1], str(queries.dtype)
    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "TESTED_JAX", jax.__version__)
    for name, backend in (("cudnn", cudnn), ("mosaic", mosaic), ("triton", triton)):
        obstacle = None if name in serve else "not here"
        monkeypatch.setattr(backend, "obstacle", lambda *_, found=obstacle: found)
        monkeypatch.setattr(backend, "TESTED", {size} if name in tested else set())
    assert automatic(queries, [TokenSource(keys, values)]) == taken


def test_a_mesh_that_xla_splits_over_is_an_obstacle():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert gpu.partition_obstacle() is None
    found = []
    with jax.set_mesh(mesh):
        assert "mesh of 8 devices" in gpu.partition_obstacle()

        @jax.shard_map(in_specs=jax.P("data"), out_specs=jax.P("data"))
        def inside(x):
            found.append(gpu.partition_obstacle())
            return x

        jax.eval_shape(inside, jnp.zeros(8))
    assert found == [None]
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert gpu.partition_obstacle() is None
