"""The tuned plans of the package, without a GPU: each lowers for Hopper where it is listed for."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from mosaic_interpreter import lowered, needs_mosaic

from seqeff_kernels import PackedIndices, RangeSource, TokenSource, gpu, tuning
from seqeff_kernels.decode_attention import mosaic as decode_mosaic
from seqeff_kernels.decode_attention import shapes as decode_shapes
from seqeff_kernels.range_attention import mosaic

TABLES = sorted(tuning.FOLDER.glob("*.json"))
UNSERVED = {
    "odd": "is not a multiple of 8",
    "odd-head": "head_dim 80 is not one of",
    "separators": "new entries counted, not 4",
}


def listed():
    """Every plan of attention once: its rows change nothing of what lowers."""
    found = {}
    for path in TABLES:
        for key, entry in tuning.read(path).get("attention", {}).get("mosaic", {}).items():
            same = path, key.partition(" rows=")[0], *entry["plan"].values()
            found[same] = pytest.param(path, key, id=f"{path.stem} {key}")
    return found.values()


@pytest.fixture
def device_of(monkeypatch):
    """Puts the table of a device in place of that of the default device."""

    def take(path):
        monkeypatch.setattr(tuning, "_paths", lambda: [path])

    return take


@needs_mosaic
@pytest.mark.parametrize(("path", "key"), listed())
def test_plans_of_attention_lower(path, key, device_of):
    device_of(path)
    fields = re.fullmatch(r"(\w+) head_dim=(\d+) group=(\d+) (.+) rows=(\d+)", key)
    assert fields
    dtype, kinds = fields[1], fields[4].split("+")
    head_dim, group, rows = (int(fields[index]) for index in (2, 3, 5))
    queries = jax.ShapeDtypeStruct((1, rows, group, head_dim), dtype)
    entries = jax.ShapeDtypeStruct((1, rows, 1, head_dim), dtype)
    bounds = jax.ShapeDtypeStruct((1, rows), jnp.int32)

    def loss(queries, keys, values, start, end, packed):
        def source(kind):
            name, window, own = re.fullmatch(r"([a-z]+)(\d*)(\(own queries\))?", kind).groups()
            own = -queries if own else None
            if name in ("causal", "window"):
                return TokenSource(keys, values, window=int(window or 0) or None, queries=own)
            return RangeSource(keys, values, start, end, own, packed if name == "packed" else None)

        sources = tuple(map(source, kinds))
        assert tuning.attention_key(queries, sources) == key
        output, logsumexp = mosaic.attend(queries, sources, 0.1)
        return output.astype(jnp.float32).sum() + logsumexp.sum()

    packed = PackedIndices(bounds, bounds)
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    text = lowered(gradient, queries, entries, entries, bounds, bounds, packed)
    own = sum("own queries" in kind for kind in kinds)
    distinct = own + (own < len(kinds))
    assert text.count("@mosaic_gpu_v2") == 1 + distinct + len(kinds)
    # the plan that was timed is the one that runs
    tiles = mosaic.Tiles(**tuning.choose("attention", "mosaic", key))
    assert tiles.fitted(head_dim, distinct, len(kinds)) == tiles


def decoding(name):
    return jax.eval_shape(lambda: decode_shapes.inputs(decode_shapes.SHAPES[name], 0, jnp.bfloat16))


@needs_mosaic
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", sorted(decode_shapes.SHAPES.keys() - UNSERVED))
def test_decoding_lowers_with_its_plan(name, path, device_of):
    device_of(path)
    text = lowered(lambda *call: decode_mosaic.attend(*call, 0.1)[0], *decoding(name))
    assert text.count("@mosaic_gpu_v2") == 1


@needs_mosaic
@pytest.mark.parametrize("name", UNSERVED)
def test_the_shapes_of_decoding_that_are_not_served(name, monkeypatch):
    monkeypatch.setattr(gpu, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "TESTED_JAX", jax.__version__)
    assert UNSERVED[name] in decode_mosaic.obstacle(*decoding(name))
