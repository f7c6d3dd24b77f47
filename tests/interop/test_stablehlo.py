"""Exported functions against the model, in a process that has jax and flatbuffers alone."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hugging_face import LENGTH, VOCABULARY, logits_of, make_run
from jax import export
from tiny_run import environment, files_of, quick_compilation, refused, seqeff
from variants import gpt_neox, learned, llama

from seqeff.checks import UserError
from seqeff.interop.stablehlo.functions import ARGUMENTS, Functions
from seqeff.interop.tensors import by_name
from seqeff.models import (
    BilevelPositions,
    CachedTransformer,
    DenseAttention,
    SeparatorAttention,
    cached_parameters,
    empty_cache,
)
from seqeff.models.caches import WholeCache
from seqeff.models.flops import abstract_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

# ids that the tokenizer has; the model has some more
KNOWN = VOCABULARY - 20
SEPARATORS = tuple(range(2, KNOWN, 7))
UNBOUNDED = SeparatorAttention(window=5, initial_tokens=2, separator_ids=SEPARATORS)
BOUNDED = dataclasses.replace(UNBOUNDED, separators=3)
DEFAULT = ("batch", "length")


def short(model, **changes):
    """Of two layers, whose own logits come from the definition of attention."""
    return dataclasses.replace(model, **({"layers": 2, "attention_backend": "reference"} | changes))


# a model, what to export it with, and the sizes that it has
EXPORTS = {
    "dense": (short(llama()), (), (*DEFAULT, "context")),
    "window": (short(gpt_neox(attention=DenseAttention(window=7))), (), DEFAULT),
    "separators": (short(llama(attention=UNBOUNDED)), (), (*DEFAULT, "kept")),
    "bounded, compact": (
        short(llama(attention=dataclasses.replace(BOUNDED, positions="compact"))),
        ("--weights", "inside"),
        DEFAULT,
    ),
    "layers that differ": (
        short(
            llama(
                attention=UNBOUNDED,
                layer_attention={0: DenseAttention(), -1: BOUNDED},
                positions=BilevelPositions(segment_length=4, separator_ids=SEPARATORS),
            ),
            layers=3,
        ),
        (),
        (*DEFAULT, "context", "kept"),
    ),
    "learned positions": (
        short(learned("relu", attention=BOUNDED, layer_attention={1: DenseAttention()})),
        (),
        (*DEFAULT, "context"),
    ),
    "fixed": (
        short(llama()),
        ("--sizes", "context=192", "batch=3", "length=70"),
        (*DEFAULT, "context"),
    ),
    "bfloat16": (
        short(llama(attention=UNBOUNDED), dtype="bfloat16"),
        (),
        (*DEFAULT, "kept"),
    ),
    "bfloat16, inside": (
        short(llama(attention=UNBOUNDED), dtype="bfloat16"),
        ("--weights", "inside"),
        (*DEFAULT, "kept"),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, KNOWN, (3, 80))
# prompts that are shorter, and longer, than a tile of the portable backend
SHORT = {"tokens": TOKENS[:1, :14], "counts": [9], "parts": 1, "decoded": 4, "context": 67}
LONG = {"tokens": TOKENS, "counts": [70, 65, 1], "parts": 1, "decoded": 6, "context": 192}
CASES = {
    "dense": {"short": SHORT, "long": LONG},
    "layers that differ": {"long": LONG, "in parts": LONG | {"parts": 3}},
    # there are fewer than the long prompt has
    "learned positions": {"short": SHORT},
    "bfloat16": {"short": SHORT},
    "bfloat16, inside": {"short": SHORT},
}
PROMPTS = [TOKENS[0, :5].tolist(), TOKENS[1, :11].tolist()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compilation_cache):
    """A run of each model, with what it was exported as in it."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    with quick_compilation(compilation_cache):
        for name, (model, options, _) in EXPORTS.items():
            made[name] = make_run(folder / name, model)
            result = seqeff("export", made[name].path, "--to", "stablehlo", *options)
            assert result.status == 0, result.errors
    return made


@pytest.fixture(scope="module")
def given(runs, tmp_path_factory, compilation_cache):
    """What the functions give in a process of their own, by model and case."""
    folder = tmp_path_factory.mktemp("given")
    cases = {
        f"{name}: {case}": values | {"folder": run.path / "stablehlo"}
        for name, run in runs.items()
        for case, values in CASES.get(name, {"long": LONG}).items()
    }
    folder_of_prompts = runs["separators"].path / "stablehlo"
    cases["prompts"] = {"folder": folder_of_prompts, "prompts": PROMPTS, "count": 6}
    text = json.dumps(cases, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    (folder / "cases.json").write_text(text)
    script = Path(__file__).with_name("fresh_process.py")
    command = [sys.executable, script, folder / "cases.json", folder / "given.npz"]
    with quick_compilation(compilation_cache):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "given.npz")


@pytest.mark.parametrize("name", EXPORTS)
def test_logits_are_those_of_whole_rows(name, runs, given):
    # bfloat16 has 8 bits
    tolerance = 2e-2 if "bfloat16" in name else 1e-5
    for case, values in CASES.get(name, {"long": LONG}).items():
        tokens, counts = values["tokens"], np.array(values["counts"])
        rows = np.pad(tokens, ((0, 3 - len(tokens)), (0, 0)))
        places = counts[:, None] - 1 + np.arange(1 + values["decoded"])
        logits = logits_of(runs[name].path, rows)[: len(tokens), :, :KNOWN]
        expected = np.take_along_axis(logits, places[:, :, None], axis=1)
        np.testing.assert_allclose(given[f"{name}: {case}"], expected, rtol=0, atol=tolerance)


def test_weights_inside_are_those_beside(given):
    inside, beside = (given[f"{name}: short"] for name in ("bfloat16, inside", "bfloat16"))
    # compilers may compute with what they know of constants
    np.testing.assert_allclose(inside, beside, rtol=0, atol=1e-2)


def test_the_example_takes_the_likeliest_tokens(runs, given):
    drawn = given["prompts"]
    assert drawn.shape == (2, 6)
    rows = np.zeros((2, 20), np.int64)
    for row, prompt, more in zip(rows, PROMPTS, drawn, strict=True):
        row[: len(prompt) + 6] = [*prompt, *more]
    likeliest = logits_of(runs["separators"].path, rows)[:, :, :KNOWN].argmax(-1)
    for row, prompt, more in zip(likeliest, PROMPTS, drawn, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 :][:6], more)


def loaded(folder):
    """By the example that lies beside it."""
    spec = importlib.util.spec_from_file_location("example", folder / "example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(folder)


def test_the_example_says_where_there_is_no_room(runs):
    fixed = loaded(runs["fixed"].path / "stablehlo")
    length = fixed.about["arrays"]["tokens"]["shape"][1]
    with pytest.raises(SystemExit, match=f"a prompt has {length + 1} tokens, of {length} it may"):
        fixed.generate([[1] * (length + 1)], 2)
    model = loaded(runs["learned positions"].path / "stablehlo")
    assert model.generate([[1, 2, 3]], 2).shape == (1, 2)
    with pytest.raises(SystemExit, match="more tokens than the cache or the positions have room"):
        model.generate([[1] * model.about["most_tokens"]], 3)


def test_what_is_written(runs):
    for name, (model, options, sizes) in EXPORTS.items():
        folder = runs[name].path / "stablehlo"
        inside = "inside" in options
        assert sorted(path.name for path in folder.iterdir()) == [
            "decode.exported",
            "example.py",
            "model.json",
            *(() if inside else ("model.safetensors",)),
            "prefill.exported",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        about = json.loads((folder / "model.json").read_text())
        assert tuple(about["sizes"]) == sizes
        assert about["row_length"] == LENGTH
        assert about["most_tokens"] == model.positions.limit
        assert about["platforms"] == ["cpu", "cuda"]
        assert ("weights" in about["arguments"]["decode"]) is not inside
        for function, names in about["arguments"].items():
            exported = export.deserialize(bytearray((folder / f"{function}.exported").read_bytes()))
            described = jax.tree.leaves(
                [about["arrays"][argument] for argument in names],
                is_leaf=lambda node: "shape" in node,
            )
            # a dict's arrays come by their sorted names
            by_shape = [(str(list(x.shape)), x.dtype.name) for x in exported.in_avals]
            assert sorted(by_shape) == sorted(
                (str(x["shape"]).replace("'", ""), x["dtype"]) for x in described
            )
            assert str(runs[name].path.parent).encode() not in exported.mlir_module_serialized
            assert str(Path(__file__).parents[2]).encode() not in exported.mlir_module_serialized


def test_an_export_is_the_same_bytes_again(runs, tmp_path):
    run, again = runs["dense"], tmp_path / "again"
    result = seqeff("export", run.path, "--to", "stablehlo", "--output", again)
    assert f"prefill and decode of any batch, length and context: {again}" in result.output
    assert files_of(again) == files_of(run.path / "stablehlo")


def outside_attention():
    path = Path(__file__).parents[2] / "experiments/custom_attention/interval_attention.py"
    spec = importlib.util.spec_from_file_location("interval_attention", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.IntervalAttention(interval=5, initial_tokens=2, window=4)


@pytest.mark.parametrize(
    "attention",
    [outside_attention(), dataclasses.replace(BOUNDED, cache_entries=16)],
    ids=["of another module", "published cache"],
)
def test_other_caches(attention):
    """Against the model that takes the same tokens in the same calls."""
    model = dataclasses.replace(llama(attention=attention), layers=1, attention_backend="xla")
    weights = cached_parameters(model, random_parameters(model))
    functions = Functions(model, KNOWN, weights)
    prefill, decode = (functions.exported(name, by_name(weights)) for name in ARGUMENTS)
    tokens, count = TOKENS[:2, :20].astype(np.int32), np.array([20, 7], np.int32)
    own = CachedTransformer.of(model, weights)

    @jax.jit
    def logits_after(cache, tokens, count):
        hidden, cache = own.extend(tokens, cache, count)
        last = jax.numpy.maximum(count - 1, 0)[:, None, None]
        return own.logits(jax.numpy.take_along_axis(hidden, last, 1))[:, 0, :KNOWN], cache

    theirs = {
        name: np.zeros([{"batch": 2, "context": 70}.get(x, x) for x in spec.shape], spec.dtype)
        for name, spec in functions.arrays["cache"].items()
    }
    found, theirs = prefill.call(theirs, tokens, count)
    wanted, ours = logits_after(empty_cache(model, 2, 70), tokens, count)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    for token in TOKENS[:2, 20:23].T.astype(np.int32):
        found, theirs = decode.call(theirs, token)
        wanted, ours = logits_after(ours, token[:, None], np.ones_like(token))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def random_parameters(model):
    random = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.split(abstract_model(model))[1])
    return jax.tree.map(lambda x: random.normal(0, 0.2, x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "exists already; give another --output"),
        (
            ("--output", "out", "--sizes", "batch=1", "length=9"),
            "length=9 are not this model's: give --sizes batch=N length=N context=N",
        ),
        (
            ("--output", "out", "--sizes", "batch=1", "length=65", "context=127"),
            "has no room for a prompt of length=65, in whole tiles 128: give at least context=128",
        ),
        (("--output", "out", "--sizes", "batch"), "'batch' is not of the form NAME=N"),
        (("--output", "out", "--sizes", "batch=0"), "'0' is not a whole number of at least 1"),
        (("--output", "out", "--dtype", "bfloat16"), "--dtype is not for --to stablehlo"),
        (("--output", "out", "--backend", "auto"), "which are of fixed sizes: give them"),
        (
            (
                *("--output", "out", "--backend", "triton"),
                *("--sizes", "batch=1", "length=64", "context=64"),
            ),
            "cannot serve this attention: it needs a CUDA device",
        ),
        (("--output", "/proc/out"), "cannot write /proc/out"),
    ],
)
def test_what_is_refused(options, message, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("export", runs["dense"].path, "--to", "stablehlo", *options)
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_other_form_are_refused(runs, tmp_path):
    for option in (("--weights", "inside"), ("--backend", "xla"), ("--sizes", "batch=1")):
        line = refused(
            "export", runs["dense"].path, "--to", "hf", *option, "--output", tmp_path / "out"
        )
        assert line == f"{option[0]} is not for --to hf; leave it out"


def test_weights_that_do_not_fit_inside(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("seqeff.interop.stablehlo.exports._MOST_INSIDE", 10_000)
    options = ("--weights", "inside", "--output", tmp_path / "out")
    line = refused("export", runs["dense"].path, "--to", "stablehlo", *options)
    assert "a function holds at most 10,000: give --weights beside" in line
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_fails(runs, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqeff.interop.stablehlo.exports.copy_tokenizer", fail)
    line = refused("export", runs["dense"].path, "--to", "stablehlo", "--output", tmp_path / "out")
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


class Undecided(DenseAttention):
    """An attention that asks how many tokens there are."""

    def cache(self):
        return WholeCache(self)

    def plan(self, tokens, document_start):
        assert tokens.shape[1] > 100
        return super().plan(tokens, document_start)


def test_an_attention_that_must_know_sizes():
    model = dataclasses.replace(llama(), attention=Undecided(), attention_backend="xla")
    weights = cached_parameters(model, random_parameters(model))
    with pytest.raises(UserError, match=r"'context' > '100' is inconclusive; give --sizes batch=N"):
        Functions(model, KNOWN, weights).exported("decode")


def test_custom_calls_of_kernels(monkeypatch):
    """Kernels are whole programs to XLA, which another version of jax need not know."""

    def kernel(queries, blocks):
        shape = jax.ShapeDtypeStruct(queries.shape, queries.dtype)
        return jax.ffi.ffi_call("triton_kernel_call_ffi", shape)(queries), None

    monkeypatch.setattr("seqeff.models.attend.decode_attention", kernel)
    model = short(llama(), layers=1, attention_backend="auto")
    weights = cached_parameters(model, random_parameters(model))
    sizes = {"batch": 1, "length": 64, "context": 64}
    exported = Functions(model, KNOWN, weights, sizes).exported("decode")
    assert exported.platforms == (jax.default_backend(),)
    assert "@triton_kernel_call_ffi" in exported.mlir_module()
    monkeypatch.setattr("seqeff.interop.stablehlo.functions._CUSTOM_CALLS", ())
    with pytest.raises(ValueError, match="triton_kernel_call_ffi"):
        Functions(model, KNOWN, weights, sizes).exported("decode")
