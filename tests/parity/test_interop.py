"""Models of transformers, imported and exported again: the same logits on every way."""

import json
import shutil

import hugging_face
import numpy as np
import pytest
import tokenizers
from hugging_face import (
    END_OF_TEXT,
    LENGTH,
    VOCABULARY,
    logits_of,
    write_json,
    write_tokenizer,
)
from tiny_run import files_of, seqeff

from seqeff.data import Tokenizer

pytestmark = pytest.mark.parity

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "max_position_embeddings": LENGTH,
}
GPT_NEOX = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 72,
    "max_position_embeddings": LENGTH,
}
GPT2 = {"n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": LENGTH}
OPT = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "ffn_dim": 56,
    "max_position_embeddings": LENGTH,
}

MODELS = {
    "pythia": ("GPTNeoX", GPT_NEOX),
    "gpt-neox, whole rotation, one after the other, tied": (
        "GPTNeoX",
        GPT_NEOX
        | {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.5,
                "rope_theta": 500.0,
                "partial_rotary_factor": 1.0,
            },
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
    ),
    "llama 2": ("Llama", LLAMA | {"num_key_value_heads": 6, "rms_norm_eps": 1e-3}),
    "llama 3": ("Llama", LLAMA | {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama, yarn": (
        "Llama",
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 3.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4,
            }
        },
    ),
    "llama, biases, large heads": (
        "Llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    ),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 7}),
    "mistral, no window": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": 4}),
    "qwen 2": ("Qwen2", LLAMA | {"hidden_act": "gelu"}),
    "qwen 2, windows": (
        "Qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen 3": ("Qwen3", LLAMA | {"head_dim": 8, "rms_norm_eps": 1e-4}),
    "qwen 3, biases, tied": (
        "Qwen3",
        LLAMA | {"head_dim": 6, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gpt-2": ("GPT2", GPT2),
    "gpt-2, untied": (
        "GPT2",
        GPT2
        | {"n_inner": 20, "activation_function": "relu", "tie_word_embeddings": False}
        | {"layer_norm_epsilon": 1e-3},
    ),
    "opt": ("OPT", OPT),
    "opt, no biases": ("OPT", OPT | {"enable_bias": False, "tie_word_embeddings": False}),
}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 41))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def random_model(case, torch, transformers):
    family, settings = MODELS[case]
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **settings)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + head)(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        # as initialised, biases are 0, norms 1 and all else so small that mistakes would hide
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 and "bias" not in name else 0.0, 0.2)
    return model


def their_logits(model, torch):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def saved(torch, transformers, tmp_path_factory):
    """A function of a case: its model, the directory that it is saved in, and its logits."""
    made = {}

    def save(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("saved")
            model = random_model(case, torch, transformers)
            model.save_pretrained(folder)
            write_tokenizer(folder)
            made[case] = model, folder, their_logits(model, torch)
        return made[case]

    return save


def imported(folder, run):
    result = seqeff("import", folder, run)
    assert result.status == 0, result.errors
    return run


def exported(run, folder):
    result = seqeff("export", run, "--to", "hf", "--output", folder)
    assert result.status == 0, result.errors
    return folder


@pytest.mark.parametrize("case", MODELS)
def test_in_and_out(case, saved, torch, transformers, tmp_path):
    _, folder, expected = saved(case)
    assert np.std(expected) > 0.5
    run = imported(folder, tmp_path / "run")
    np.testing.assert_allclose(logits_of(run, TOKENS), expected, atol=1e-4, rtol=1e-4)

    out = exported(run, tmp_path / "out")
    again, notes = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # without a window Mistral is Llama
    family = "Llama" if case == "mistral, no window" else MODELS[case][0]
    assert type(again).__name__.startswith(family)
    np.testing.assert_allclose(their_logits(again.eval(), torch), expected, atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "the dog, and\n the cat"
    assert tokenizer(text)["input_ids"] == Tokenizer.load(run / "tokenizer").encode(text)
    assert tokenizer.eos_token_id == again.config.eos_token_id
    assert tokenizer.eos_token_id == again.generation_config.eos_token_id

    twice = exported(imported(out, tmp_path / "run2"), tmp_path / "out2")
    assert files_of(out) == files_of(twice)


@pytest.mark.parametrize("case", ["pythia", "llama 3", "gpt-2", "opt"])
def test_from_files_of_pytorch(case, saved, torch, tmp_path):
    model, _, expected = saved(case)
    model.config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tensors = model.state_dict()
    if case == "opt":
        tensors = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    if case == "gpt-2":
        parts = [dict(list(tensors.items())[first::2]) for first in range(2)]
        files = [f"pytorch_model-{part}-of-2.bin" for part in (1, 2)]
        index = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        for part, file in zip(parts, files, strict=True):
            torch.save(part, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    run = imported(tmp_path, tmp_path / "run")
    np.testing.assert_allclose(logits_of(run, TOKENS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_half_the_size(dtype, saved, torch, transformers, tmp_path):
    _, folder, _ = saved("llama 3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    write_tokenizer(tmp_path)
    run = imported(tmp_path, tmp_path / "run")
    config, parameters = hugging_face.model_of(run)
    assert config.dtype == "bfloat16"
    expected = model.model.embed_tokens.weight.float().detach().numpy()
    np.testing.assert_array_equal(parameters["embedding"], expected)


def test_code_in_a_file_of_pytorch_is_not_run(saved, torch, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    saved("pythia")[0].config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    torch.save({"code": Code()}, tmp_path / "pytorch_model.bin")
    result = seqeff("import", tmp_path, tmp_path / "run")
    assert result.status == 2
    assert "as tensors alone" in result.errors
    assert not (tmp_path / "opened").exists()
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_vocabulary_and_merges(saved, transformers, tmp_path):
    """As the models of OPT have them, whose texts begin with a token."""
    _, folder, _ = saved("opt")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.model.save(str(tmp_path))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(tmp_path / "special_tokens_map.json", names)
    write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **names},
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    run = imported(tmp_path, tmp_path / "run")
    again = transformers.AutoTokenizer.from_pretrained(exported(run, tmp_path / "out"))
    text = " the dóg,\n and  the cat"
    expected = theirs(text)["input_ids"]
    assert again(text)["input_ids"] == expected
    assert Tokenizer.load(run / "tokenizer").encode(text) == expected[1:]


def test_a_run_that_was_trained_here(finished, torch, transformers, tmp_path):
    out = exported(finished, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == Tokenizer.load(finished / "tokenizer").encode(
        "the cat sat on the mat"
    )
    with torch.no_grad():
        expected = model(tokens).logits.numpy()
    np.testing.assert_allclose(logits_of(finished, tokens.numpy()), expected, atol=1e-4, rtol=1e-4)
    written = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("the cat sat on the mat")
