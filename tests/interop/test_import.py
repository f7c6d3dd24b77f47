"""What an imported run is good for, and what is refused."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from hugging_face import (
    END_OF_TEXT,
    change_settings,
    change_weights,
    logits_of,
    make_run,
    model_of,
    write_json,
)
from tiny_run import files_of, refused, seqeff, steps_of
from variants import VARIANTS, learned, llama

from seqeff import config
from seqeff.data import Tokenizer
from seqeff.runs import RunDirectory

pytestmark = pytest.mark.usefixtures("quick_compilation")


def done(*arguments):
    result = seqeff(*arguments)
    assert result.status == 0, result.errors
    return result.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Hugging Face directory; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    run = make_run(folder / "run", llama())
    done("export", run.path, "--to", "hf", "--output", folder / "hf")
    return folder / "hf"


@pytest.fixture
def source(saved, tmp_path):
    """A copy to do anything with."""
    return shutil.copytree(saved, tmp_path / "source")


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory):
    run = tmp_path_factory.mktemp("imported") / "run"
    done("import", saved, run)
    return run


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("the cat sat on the mat, and the dog ran. " * 40)
    return file


def test_the_directory_explains_itself(saved, imported):
    run = RunDirectory(imported).require()
    assert run.config.read_text().startswith(f"# imported from {saved}\n")
    assert json.loads(run.versions.read_text())["packages"]["jax"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run.tokenizer / name).read_bytes() == (saved / name).read_bytes()
    assert sorted(path.name for path in run.path.iterdir() if path.is_dir()) == [
        "checkpoints",
        "tokenizer",
    ]


def test_what_to_type_next_can_be_typed(source, tmp_path, book, monkeypatch):
    monkeypatch.setattr("seqeff.cli.exchange._USUAL_ROW", 64)
    change_settings(source, max_position_embeddings=131_072)
    run = tmp_path / "a run"
    *_, generate, evaluate = done("import", source, run).splitlines()
    assert evaluate.endswith("=64")
    for line in (generate, evaluate):
        program, *arguments = shlex.split(line.replace("FILE", str(book)))
        assert program == "seqeff"
        done(*arguments, *(["--tokens", 2] if line == generate else []))


def test_it_is_evaluated_on_documents_that_are_given(imported, book):
    line = refused("eval", imported)
    assert "an imported model comes without documents" in line
    validation = ["--gin.Data.validation=@TextFiles()", f"--gin.TextFiles.paths=('{book}',)"]
    dense = done("eval", imported, *validation)
    assert dense.startswith("loss ")
    mask = [
        "--gin.TransformerConfig.attention=@SeparatorAttention()",
        "--gin.SeparatorAttention.window=3",
    ]
    assert done("eval", imported, *validation, *mask) != dense
    assert "SepLLM" in done(
        "eval",
        imported,
        *mask,
        "--gin.SeparatorAttention.separators=4",
        "--gin.SeparatorAttention.positions=compact",
        "--streaming",
        book,
    )


def test_separators_that_its_tokenizer_lacks(imported):
    mask = "--gin.TransformerConfig.attention=@SeparatorAttention()"
    for changes, message in (
        (["characters=†"], "characters = '†': no token of the tokenizer ends with any of them"),
        (["preset=llama3"], "lie outside the tokenizer's 263 tokens"),
        (["preset=pythia"], "preset = 'pythia' is for another tokenizer"),
    ):
        changes = [f"--gin.SeparatorAttention.{change}" for change in changes]
        assert message in refused("generate", imported, "--prompt", "the ", mask, *changes)


def test_it_generates(imported):
    output = done("generate", imported, "--prompt", "the", "--tokens", 5, "--temperature", 0)
    assert output.startswith("the")


def test_it_is_the_parent_of_a_run(imported, book, tmp_path):
    child = tmp_path / "child.gin"
    child.write_text(
        f"""
include '{imported}/operative_config.gin'
Train.parent = '{imported}'
Train.steps = 2
Train.log_every = 1
Train.sample_tokens = 2
TransformerConfig.attention = @SeparatorAttention()
SeparatorAttention.window = 3
Data.source = @TextFiles()
Data.cache = 'cache'
Data.sequence_length = 16
Data.batch_size = 2
Data.holdout = 0.0
TextFiles.paths = ('{book}',)
AdamW.learning_rate = 1e-9
MeshConfig.data = 1
"""
    )
    run = tmp_path / "run"
    done("train", child, "--run-dir", run)
    assert len([line for line in steps_of(run) if "loss" in line]) == 2
    ours, theirs = model_of(run)[1], model_of(imported)[1]
    np.testing.assert_allclose(ours["embedding"], theirs["embedding"], atol=1e-7)
    assert "SeparatorLlamaForCausalLM" in done("export", run, "--to", "hf")
    assert files_of(run / "tokenizer").keys() == files_of(imported / "tokenizer").keys()


def test_it_is_not_trained_in_place(imported, book):
    line = refused("train", imported / "operative_config.gin", "--run-dir", imported)
    assert "to train it, begin a run with Train.parent" in line


def rename(tensors):
    tensors["model.layers.0.mlp.up_project.weight"] = tensors.pop(
        "model.layers.0.mlp.up_proj.weight"
    )


def replace(name, make):
    def change(tensors):
        tensors[name] = make(tensors[name])

    return change


WEIGHTS = {
    "missing": (
        lambda tensors: [
            tensors.pop(f"model.layers.{layer}.mlp.up_proj.weight") for layer in (0, 2)
        ],
        "lack tensors of the model: model.layers.0.mlp.up_proj.weight, "
        "model.layers.2.mlp.up_proj.weight",
    ),
    "surplus": (
        lambda tensors: tensors.update({"model.extra": np.zeros(3, np.float32)}),
        "hold tensors that the model has no place for: model.extra",
    ),
    "renamed": (rename, "lack tensors of the model: model.layers.0.mlp.up_proj.weight"),
    "shape": (
        replace("model.norm.weight", lambda array: array[1:].copy()),
        "do not fit config.json: model.norm.weight is F32 [23] instead of floating-point numbers "
        "[24]",
    ),
    "type": (
        replace("model.norm.weight", lambda array: array.astype(np.int8)),
        "model.norm.weight is I8 [24] instead of floating-point numbers [24]",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_match(case, source, tmp_path):
    change, message = WEIGHTS[case]
    change_weights(source, change)
    assert message in refused("import", source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


SETTINGS = {
    "architecture": (
        {"architectures": ["MambaForCausalLM"]},
        "the architecture 'MambaForCausalLM' is not supported; supported are GPTNeoXForCausalLM, "
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
        "GPT2LMHeadModel, OPTForCausalLM",
    ),
    "no architecture": ({"architectures": ...}, "the architecture None is not supported"),
    "absent": ({"hidden_size": ...}, "config.json has no hidden_size; give a whole number"),
    "type": ({"hidden_size": "24"}, "hidden_size = '24' is not a whole number"),
    "bool": ({"hidden_size": True}, "hidden_size = True is not a whole number"),
    "activation": ({"hidden_act": "mish"}, "hidden_act = 'mish' is not supported; supported are"),
    "heads": ({"num_attention_heads": 5}, "num_attention_heads = 5 must divide hidden_size = 24"),
    "groups": ({"num_key_value_heads": 3}, "HeadProjections.kv_heads = 3 must divide heads = 4"),
    "layers": ({"num_hidden_layers": 4}, "lack tensors of the model: model.layers.3."),
    "width": ({"intermediate_size": 21}, "do not fit config.json: model.layers.0.mlp"),
    "rope": (
        {"rope_scaling": {"rope_type": "longrope"}},
        "rope_type = 'longrope' is not supported; supported are default, linear, llama3, yarn",
    ),
    "rope of layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters differs between layers",
    ),
    "rope without factor": (
        {"rope_scaling": {"type": "linear"}},
        "config.json: rope_scaling has no factor; give a number",
    ),
    "yarn of other code": (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.7,
            }
        },
        "mscale = 0.7 is not supported",
    ),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "= 0.5 is not supported"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
    "code": ({"auto_map": {"AutoModel": "modeling.Mine"}}, "is never run"),
    "dtype": ({"torch_dtype": "int8"}, "torch_dtype = 'int8' is not supported"),
    "vocabulary": ({"vocab_size": 200}, "has 263 tokens, the vocab_size of config.json is 200"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be(case, source, tmp_path, no_devices):
    changes, message = SETTINGS[case]
    change_settings(source, **changes)
    assert message in refused("import", source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


OTHERS = {
    "opt": (
        {"word_embed_proj_dim": 12},
        "word_embed_proj_dim = 12 is not supported; only 24 is",
    ),
    "opt, post-norm": (
        {"do_layer_norm_before": False},
        "do_layer_norm_before = False is not supported; only True is",
    ),
    "gpt-2": (
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx = True is not supported",
    ),
    "qwen 2, windows": (
        {"layer_types": ["full_attention"]},
        "layer_types = ['full_attention'] must",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_settings_of_other_families(case, tmp_path):
    changes, message = OTHERS[case]
    run = make_run(tmp_path / "run", VARIANTS[case.removesuffix(", post-norm")][1])
    done("export", run.path, "--to", "hf", "--output", tmp_path / "hf")
    change_settings(tmp_path / "hf", **changes)
    assert message in refused("import", tmp_path / "hf", tmp_path / "back")


def test_files_that_are_not_there_or_damaged(source, tmp_path):
    run = tmp_path / "run"

    def line():
        found = refused("import", source, run)
        assert not run.exists()
        return found

    (tmp_path / "file").touch()
    for name, reason in (("nowhere", "No such file or directory"), ("file", "Not a directory")):
        found = refused("import", tmp_path / name, run)
        assert found.startswith(f"cannot read {tmp_path / name}: {reason}; give the directory")
    settings = (source / "config.json").read_text()
    (source / "config.json").write_text("{")
    assert "config.json is not valid JSON" in line()
    (source / "config.json").write_text("[]")
    assert "config.json holds no JSON object" in line()
    (source / "config.json").unlink()
    assert "holds no config.json" in line()
    (source / "config.json").write_text(settings)
    beside = source / "tokenizer_config.json"
    settings = beside.read_text()
    beside.write_text("[]")
    assert f"{beside} holds no JSON object" in line()
    beside.write_text(settings)
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:1000])
    assert "cannot read" in line()
    (source / "model.safetensors").unlink()
    assert "holds no weights: no model.safetensors" in line()
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "part.safetensors"}}))
    assert "lists part.safetensors, which is not there" in line()
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../config.json"}}))
    assert "which is no file beside it" in line()
    (source / "part.safetensors").write_bytes(weights)
    index.write_text(json.dumps({"weight_map": {"model.nrm.weight": "part.safetensors"}}))
    assert "lists tensors that its files lack: model.nrm.weight" in line()
    (source / "tokenizer.json").unlink()
    assert "holds no tokenizer.json" in line()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(name, source, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n"
    (source / name).write_text(pointer)
    line = refused("import", source, tmp_path / "run")
    assert line.startswith(f"{source / name} is a pointer of Git LFS, not the file: fetch it there")


def test_files_of_pytorch_need_it(source, tmp_path, monkeypatch):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refused("import", source, tmp_path / "run")
    assert "pytorch_model.bin needs PyTorch to be read: pip install torch" in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(source, imported):
    before = files_of(imported)
    assert "holds a run already" in refused("import", source, imported)
    assert files_of(imported) == before


def test_a_directory_of_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    assert "neither empty nor a run directory" in refused("import", source, tmp_path / "other")
    line = refused("import", source, tmp_path / "other/file")
    assert line == f"{tmp_path / 'other/file'} is a file; choose another directory"


def test_an_import_that_was_interrupted_is_done_again(source, imported, tmp_path):
    """A checkpoint of an earlier import, of another model, does not stay."""
    run = RunDirectory(tmp_path / "run")
    other = make_run(tmp_path / "other", learned("relu"))
    shutil.copytree(other.checkpoints, run.checkpoints)
    (run.path / ".lock").touch()
    done("import", source, run.path)
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(logits_of(run.path, tokens), logits_of(imported, tokens))


def test_nothing_is_left_where_the_disk_is_full(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqeff.interop.tokenizer_files.shutil.copyfile", fail)
    line = refused("import", source, tmp_path / "run")
    assert f"cannot write the run directory {tmp_path}/run: No space left on device" in line
    assert not (tmp_path / "run").exists()


def test_a_head_that_only_repeats_the_embedding(tmp_path):
    run = make_run(tmp_path / "run", learned("gelu_tanh"))
    folder = tmp_path / "hf"
    done("export", run.path, "--to", "hf", "--output", folder)

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
        tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.uint8)

    change_weights(folder, add_head)
    done("import", folder, tmp_path / "back")
    change_weights(folder, replace("lm_head.weight", lambda array: array + 1))
    assert "no place for: lm_head.weight" in refused("import", folder, tmp_path / "other")


def test_names_without_the_prefix(tmp_path):
    run = make_run(tmp_path / "run", learned("gelu_tanh"))
    folder = tmp_path / "hf"
    done("export", run.path, "--to", "hf", "--output", folder)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change_weights(folder, strip)
    done("import", folder, tmp_path / "back")
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(logits_of(tmp_path / "back", tokens), logits_of(run.path, tokens))


def test_the_tokenizer_keeps_what_comes_with_it(source, tmp_path):
    (source / "chat_template.jinja").write_text("{{ messages }}")
    done("import", source, tmp_path / "run")
    done("export", tmp_path / "run", "--to", "hf", "--output", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(source)


def test_the_config_in_the_readme_goes_on_from_it(imported, tmp_path):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(include 'RUN_DIR/.*?)```", text, re.DOTALL)
    (tmp_path / "mine.gin").write_text(example.replace("RUN_DIR", str(imported)))
    train = config.load(tmp_path / "mine.gin").root
    assert train.parent == str(imported)
    assert train.model.width == model_of(imported)[0].width


def test_texts_begin_as_the_tokenizer_says(source, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    inner.add_special_tokens(["<s>"])
    begin = inner.token_to_id("<s>")
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    inner.save(str(source / "tokenizer.json"))
    done("import", source, tmp_path / "run")
    done("export", tmp_path / "run", "--to", "hf", "--output", tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())
    end = inner.token_to_id(END_OF_TEXT)
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (begin, end)


def split_tokenizer(folder):
    """Leaves vocabulary and merges of a `tokenizer.json`, as OPT has them."""
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    names = {"bos_token": END_OF_TEXT, "eos_token": {"content": END_OF_TEXT}, "pad_token": "none"}
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "eos_token": END_OF_TEXT})


def test_a_tokenizer_of_vocabulary_and_merges(source, imported, tmp_path):
    split_tokenizer(source)
    done("import", source, tmp_path / "run")
    whole, made = (Tokenizer.load(run / "tokenizer") for run in (imported, tmp_path / "run"))
    text = f"the cat,\n and {END_OF_TEXT} the dóg"
    assert made.encode(text) == whole.encode(text)
    assert made.vocabulary() == whole.vocabulary()
    assert made.end_of_text == whole.end_of_text
    done("export", tmp_path / "run", "--to", "hf", "--output", tmp_path / "out")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert inner.encode("the").ids == [made.end_of_text, *made.encode("the")]
    (source / "merges.txt").write_text("a b c d\n")
    line = refused("import", source, tmp_path / "other")
    assert f"cannot read vocab.json and merges.txt in {source}" in line


ENDS_IN = ("config.json", "generation_config.json")


@pytest.mark.parametrize("place", ENDS_IN)
def test_all_ends_of_text_come_along(place, source, tmp_path):
    file = source / place
    settings = json.loads(file.read_text()) if file.exists() else {"temperature": 0.5}
    inner = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    inner.add_special_tokens(["<|answered|>"])
    answered = inner.token_to_id("<|answered|>")
    inner.save(str(source / "tokenizer.json"))
    # 5 is text
    write_json(file, settings | {"eos_token_id": [answered, 0, 5, 999_999]})
    result = seqeff("import", source, tmp_path / "run")
    assert result.status == 0
    assert "ends texts with 5, 999999, no special token of its tokenizer" in result.errors
    tokenizer = Tokenizer.load(tmp_path / "run/tokenizer")
    assert tokenizer.ends_of_text == (0, answered)
    done("export", tmp_path / "run", "--to", "hf", "--output", tmp_path / "out")
    out = [json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] for name in ENDS_IN]
    assert out[0] == [0, answered] and {*out[1]} == {*out[0]}
    done("import", tmp_path / "out", tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again/tokenizer").ends_of_text == (0, answered)
    done("export", tmp_path / "again", "--to", "hf", "--output", tmp_path / "same")
    assert files_of(tmp_path / "same") == files_of(tmp_path / "out")
    kept = json.loads((tmp_path / "again/tokenizer/generation_config.json").read_text())
    assert kept.get("temperature") == (None if place == "config.json" else 0.5)


def test_ends_of_text_that_are_no_ids(source, tmp_path):
    write_json(source / "generation_config.json", {"eos_token_id": ["</s>"]})
    line = refused("import", source, tmp_path / "run")
    assert "eos_token_id = ['</s>'] is neither an id nor a list of ids" in line


def test_a_number_that_a_type_has_no_room_for_is_named(source, tmp_path):
    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = np.full_like(tensors[name], 1e5)
    safetensors.numpy.save_file(tensors, file)
    done("import", source, tmp_path / "run")
    line = refused("export", tmp_path / "run", "--to", "hf", "--dtype", "float16")
    assert f"{name} holds numbers beyond float16, up to 1e+05; give --dtype bfloat16" in line
    assert not (tmp_path / "run" / "hf").exists()
