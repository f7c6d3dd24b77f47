"""Every variant out, in and out again; and what cannot go out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hugging_face import VOCABULARY, change_settings, logits_of, make_run, model_of
from safetensors.numpy import load_file
from tiny_run import files_of, refused, seqeff
from variants import (
    BOUNDED,
    LOW_RANK,
    MASKED,
    PLAIN,
    VARIANTS,
    gpt_neox,
    learned,
    llama,
    low_rank,
    separators,
)

from seqeff.checks import UserError
from seqeff.data import Tokenizer
from seqeff.interop import export_model, open_model
from seqeff.interop.families import FAMILIES
from seqeff.models import (
    BilevelPositions,
    FeedForward,
    HeadProjections,
    LowRankLinear,
    RMSNorm,
    SeparatorAttention,
)
from seqeff.models.flops import parameter_count

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 41))


def done(*arguments):
    result = seqeff(*arguments)
    assert result.status == 0, result.errors
    return result.output


@pytest.mark.parametrize("variant", VARIANTS)
def test_out_and_in_is_the_same_model_and_out_again_the_same_bytes(variant, tmp_path):
    architecture, model = VARIANTS[variant]
    run = make_run(tmp_path / "run", model)
    first, back, second = (tmp_path / name for name in ("first", "back", "second"))
    assert architecture in done("export", run.path, "--to", "hf", "--output", first)
    done("import", first, back)
    np.testing.assert_array_equal(logits_of(back, TOKENS), logits_of(run.path, TOKENS))
    done("export", back, "--to", "hf", "--output", second)
    assert files_of(first) == files_of(second)


@pytest.mark.parametrize("variant", LOW_RANK)
def test_low_rank_layers_go_out_multiplied_out(variant, tmp_path):
    architecture, model = LOW_RANK[variant]
    run = make_run(tmp_path / "run", model)
    first, back, second = (tmp_path / name for name in ("first", "back", "second"))
    output = done("export", run.path, "--to", "hf", "--output", first)
    assert f"{architecture}: " in output
    assert any(first.glob("*.py")) == architecture.startswith("Separator")
    done("import", first, back)
    (_, own), (dense, found) = model_of(run.path), model_of(back)
    assert dense.attentions() == model.attentions()
    written = []
    for part in ("projections", "feed_forward"):
        for name, layer in own["layers"][part].items():
            down, up = (np.asarray(layer[factor], np.float64) for factor in ("down", "up"))
            expected = np.einsum("lir,lro->lio", down, up)
            # half a unit in the last place of float32
            np.testing.assert_allclose(found["layers"][part][name]["kernel"], expected, rtol=6e-8)
            written.append(f"layers.{part}.{name}.kernel")
    names, numbers = output.splitlines()[-1].removeprefix("multiplied out: ").split("; ")
    assert sorted(names.split(", ")) == sorted(written)
    assert numbers == (
        f"{parameter_count(dense):,} parameters instead of {parameter_count(model):,}"
    )
    np.testing.assert_allclose(
        logits_of(back, TOKENS), logits_of(run.path, TOKENS), atol=1e-5, rtol=1e-5
    )
    done("export", back, "--to", "hf", "--output", second)
    assert files_of(first) == files_of(second)


def test_every_family_has_a_variant():
    assert {name for name, _ in PLAIN.values()} == {family.architecture for family in FAMILIES}


def test_files_of_a_limited_size(tmp_path):
    run = make_run(tmp_path / "run", llama())
    with open_model(exported(run, tmp_path / "whole")) as whole:
        config, tokenizer = whole.config, whole.tokenizer
    parts = tmp_path / "parts"
    export_model(run, config, 48, tokenizer, parts, shard_bytes=20_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    # the embeddings alone are larger
    assert sum(len(load_file(parts / file)) == 1 for file in files) >= 2
    for name, file in index["weight_map"].items():
        assert name in load_file(parts / file)
    done("import", parts, tmp_path / "back")
    np.testing.assert_array_equal(logits_of(tmp_path / "back", TOKENS), logits_of(run.path, TOKENS))


def exported(run, folder):
    done("export", run.path, "--to", "hf", "--output", folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_half_the_size(dtype, tmp_path):
    run = make_run(tmp_path / "run", llama())
    done("export", run.path, "--to", "hf", "--dtype", dtype)
    done("import", run.path / "hf", tmp_path / "back")
    model, parameters = model_of(tmp_path / "back")
    assert model.dtype == "bfloat16"
    for rounded, whole in zip(
        jax.tree.leaves(parameters), jax.tree.leaves(model_of(run.path)[1]), strict=True
    ):
        np.testing.assert_array_equal(rounded, whole.astype(dtype).astype("float32"))
    done("export", tmp_path / "back", "--to", "hf", "--dtype", dtype)
    assert files_of(tmp_path / "back/hf") == files_of(run.path / "hf")


def test_what_is_written(tmp_path):
    run = make_run(tmp_path / "run", learned("relu"))
    output = done("export", run.path, "--to", "hf")
    folder = run.path / "hf"
    assert str(folder) in output
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "config.json").stat().st_mode & 0o777
    }
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (0, 0)
    positions = load_file(folder / "model.safetensors")["model.decoder.embed_positions.weight"]
    assert not positions[:2].any()
    np.testing.assert_array_equal(positions[2:], model_of(run.path)[1]["position_embedding"])
    assert "exists already; give another --output" in refused("export", run.path, "--to", "hf")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            gpt_neox(attention=separators(separators=2, cache_entries=12)),
            "nearest, GPTNeoXForCausalLM, has no place for SeparatorAttention.cache_entries = 12 "
            "in layers 0, 1, 2",
        ),
        (
            llama(layer_attention={1: separators(separators=2, cache_entries=12)}),
            "SeparatorAttention.cache_entries = 12 in layers 1",
        ),
        (
            gpt_neox(attention=BOUNDED, positions=BilevelPositions()),
            "positions = BilevelPositions, ",
        ),
        (
            low_rank(llama(feed_forward=FeedForward(hidden=20, activation="silu"))),
            "has no place for feed_forward.gated = False",
        ),
        (
            learned("relu", projections=HeadProjections(heads=3, head_norm=RMSNorm())),
            "the tensor layers.projections.key_norm.scale",
        ),
    ],
)
def test_what_no_family_can_express_is_named(model, message, tmp_path):
    run = make_run(tmp_path / "run", model)
    line = refused("export", run.path, "--to", "hf")
    assert "is of no family of transformers (GPTNeoXForCausalLM, LlamaForCausalLM" in line
    assert message in line
    assert not (run.path / "hf").exists()


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", llama())

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqeff.interop.weights.save_file", fail)
    line = refused("export", run.path, "--to", "hf", "--output", tmp_path / "out")
    assert "cannot write" in line
    assert "No space left on device" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def masked(tmp_path):
    """The directory of a model with a modelling file."""
    run = make_run(tmp_path / "masked", MASKED["llama, all kinds"][1])
    return exported(run, tmp_path / "hf")


def test_what_a_modelling_file_comes_with(masked):
    settings = json.loads((masked / "config.json").read_text())
    assert settings["architectures"] == ["SeparatorLlamaForCausalLM"]
    # what does not run the file must not take it for Llama
    assert settings["model_type"] == "separator_llama"
    assert settings["auto_map"] == {
        "AutoConfig": "modeling_separator.SeparatorLlamaConfig",
        "AutoModelForCausalLM": "modeling_separator.SeparatorLlamaForCausalLM",
    }
    attention = settings["seqeff"]["attention"]
    assert (attention["class"], attention["separators"]) == ("SeparatorAttention", 2)
    assert attention["separator_ids"] == list(BOUNDED.separator_ids)
    layers = settings["seqeff"]["layer_attention"]
    assert layers["0"] == {"class": "DenseAttention", "window": 9}
    assert sorted(layers) == ["0", "1"]
    code = (masked / "modeling_separator.py").read_text()
    assert "class SeparatorLlamaForCausalLM(LlamaForCausalLM):" in code
    assert "import seqeff" not in code
    assert "neox" not in code.lower()


def test_a_modelling_file_is_not_run(masked, tmp_path):
    (masked / "modeling_separator.py").write_text("raise SystemExit(1)")
    done("import", masked, tmp_path / "back")
    model, _ = model_of(tmp_path / "back")
    assert model.attentions() == MASKED["llama, all kinds"][1].attentions()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": {"class": "Path"}}, "seqeff: there is no class 'Path'"),
        ({"attention": {"class": "DenseAttention", "size": 3}}, "keyword argument 'size'"),
        ({"attention": {"class": "DenseAttention", "window": "x"}}, "window = 'x' is of type str"),
        ({"attention": {"class": "DenseAttention", "window": 0}}, "window = 0 must be at least 1"),
        ({"layer_attention": {"7": {"class": "DenseAttention"}}}, "names layer 7; there are 3"),
        ({"layer_attention": {"x": {"class": "DenseAttention"}}}, "'x'"),
        ({"attentions": 3}, "keyword argument 'attentions'"),
        ({"attention": None}, "attention = None is of type NoneType"),
        ("x", "seqeff = 'x' is not an object"),
    ],
)
def test_fields_that_cannot_be(fields, message, masked, tmp_path):
    change_settings(masked, seqeff=fields)
    line = refused("import", masked, tmp_path / "back")
    assert message in line
    assert "config.json: seqeff" in line
    assert not (tmp_path / "back").exists()


def test_separators_of_another_tokenizer(masked, tmp_path):
    fields = {"class": "SeparatorAttention", "separator_ids": [1, 263]}
    change_settings(masked, seqeff={"attention": fields})
    line = refused("import", masked, tmp_path / "back")
    assert "separator ids [263] lie outside the tokenizer's 263 tokens" in line
    assert not (tmp_path / "back").exists()


def test_an_attention_of_elsewhere_is_named(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(SeparatorAttention):
        pass

    config = llama(layer_attention={1: Other(separator_ids=())})
    run = make_run(tmp_path / "run", llama())
    with pytest.raises(UserError, match=r"has no place for Other in layers 1$"):
        export_model(run, config, 48, Tokenizer.load(run.tokenizer), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_linear_map_of_elsewhere_is_named(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(LowRankLinear):
        pass

    heads = HeadProjections(heads=3, key=LowRankLinear(rank=2), output=Other(rank=3))
    run = make_run(tmp_path / "run", gpt_neox())
    message = (
        r"GPTNeoXForCausalLM, has no place for projections\.output = Other, "
        r"projections\.output\.rank = 3, the tensor layers\.projections\.output\.down, "
        r"the tensor layers\.projections\.output\.up$"
    )
    with pytest.raises(UserError, match=message):
        export_model(
            run, gpt_neox(projections=heads), 48, Tokenizer.load(run.tokenizer), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_separators_that_a_run_is_given_for_its_export(tmp_path):
    run = make_run(tmp_path / "run", llama())
    attention = "--gin.TransformerConfig.attention=@SeparatorAttention()"
    folder = tmp_path / "hf"
    assert "SeparatorLlama" in done("export", run.path, "--to", "hf", "--output", folder, attention)
    ids = json.loads((folder / "config.json").read_text())["seqeff"]["attention"]["separator_ids"]
    texts = [Tokenizer.load(run.tokenizer).vocabulary()[i] for i in ids]
    assert {".", ","} <= set(texts)
    assert all(text[-1] in ".,?!;: \t\n" for text in texts)
    none = "--gin.SeparatorAttention.characters=†"
    line = refused("export", run.path, "--to", "hf", attention, none)
    assert "SeparatorAttention.characters = '†': no token of the tokenizer ends with any" in line
    assert not (run.path / "hf").exists()


def test_how_a_model_is_computed_does_not_matter(tmp_path):
    model = dataclasses.replace(
        llama(), dtype="bfloat16", rematerialise="everything", unroll=2, attention_backend="xla"
    )
    assert "Llama" in done("export", make_run(tmp_path / "run", model).path, "--to", "hf")
