"""Tasks of lm-evaluation-harness: the same scores as by its own backend for transformers."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
from chat_templates import STRICT
from harness_tasks import TASKS, harness_model, local_tasks, write_tasks  # noqa: F401
from hugging_face import END_OF_TEXT, LENGTH, make_run, write_tokenizer
from tiny_run import seqeff
from variants import MASKED, PLAIN

from seqeff.data import ChatTemplate
from seqeff.evaluation.harness import command
from seqeff.runs import RunDirectory

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation", "local_tasks")]
_TOKENS = 263


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def theirs(folder, **settings):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3, **settings)


def evaluated(model, tasks, names=TASKS, shots=None, chat=False):
    loaded = command.load_tasks(names, include=tasks, shots=shots, seed=3)
    return command.evaluate(model, loaded.tasks, limit=None, chat=chat)


def equal(found, expected):
    for mine, other in zip(command.rows(found), command.rows(expected), strict=True):
        assert mine["task"] == other["task"]
        assert mine["sha256"] == other["sha256"]
        for name, value in other["metrics"].items():
            if value is not None:
                # perplexities of models that are random reach millions
                np.testing.assert_allclose(
                    mine["metrics"][name], value, atol=1e-3, rtol=1e-5, err_msg=name
                )
    for task, samples in expected["samples"].items():
        for mine, other in zip(found["samples"][task], samples, strict=True):
            assert mine["arguments"] == other["arguments"]
            for (got,), (wanted,) in zip(mine["resps"], other["resps"], strict=True):
                if isinstance(wanted, str):
                    assert got == wanted
                    continue
                chance, *greedy = got if isinstance(got, tuple) else (got,)
                expected_chance, *expected_greedy = (
                    wanted if isinstance(wanted, tuple) else (wanted,)
                )
                np.testing.assert_allclose(chance, expected_chance, atol=1e-3, rtol=0)
                assert greedy == expected_greedy


def responses(found, task):
    return [response for sample in found["samples"][task] for (response,) in sample["resps"]]


def test_a_run_that_was_trained_here(finished, tasks, torch, tmp_path, capfd):
    out = tmp_path / "out"
    result = seqeff("export", finished, "--to", "hf", "--output", out)
    assert result.status == 0, result.errors
    hf = theirs(out)
    found = evaluated(harness_model(finished), tasks)
    # some contexts were too long, in scoring and in generating
    assert capfd.readouterr().err.count("lose their beginnings") == 2
    equal(found, evaluated(hf, tasks))
    greedy = [response[1] for response in responses(found, "local_choice")]
    assert 0 < sum(greedy) < len(greedy)
    shots = evaluated(harness_model(finished), tasks, ["local_choice"], shots=1)
    equal(shots, evaluated(hf, tasks, ["local_choice"], shots=1))
    assert responses(shots, "local_choice") != responses(found, "local_choice")


def test_a_begin_of_text_that_no_text_begins_with(tasks, torch, tmp_path):
    """As the settings of some tokenizers of chats name it."""
    run = make_run(
        tmp_path / "run", dataclasses.replace(PLAIN["llama"][1], vocabulary_size=_TOKENS)
    )
    file = run.tokenizer / "tokenizer_config.json"
    # of a byte that no text holds
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "\u0100"}))
    result = seqeff("export", run.path, "--to", "hf")
    assert result.status == 0, result.errors
    begin = json.loads((run.path / "hf" / "config.json").read_text())["bos_token_id"]
    model = harness_model(run.path)
    assert model.prefix_token_id == begin != model.eot_token_id
    equal(evaluated(model, tasks), evaluated(theirs(run.path / "hf"), tasks))


@pytest.mark.parametrize("case", ["gpt-neox, bounded, full layers", "llama, all kinds"])
def test_separators_through_the_modelling_file(case, tasks, torch, tmp_path, monkeypatch):
    copies = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", copies)
    # transformers draws ids without text too, as only random models do
    run = make_run(tmp_path / "run", dataclasses.replace(MASKED[case][1], vocabulary_size=_TOKENS))
    result = seqeff("export", run.path, "--to", "hf")
    assert result.status == 0, result.errors
    found = evaluated(harness_model(run.path), tasks)
    equal(found, evaluated(theirs(run.path / "hf", trust_remote_code=True), tasks))
    # the mask matters
    dense = ["--gin.TransformerConfig.attention=@DenseAttention()"]
    dense += ["--gin.TransformerConfig.layer_attention={}"]
    result = seqeff("export", run.path, "--to", "hf", "--output", tmp_path / "dense", *dense)
    assert result.status == 0, result.errors
    other = evaluated(theirs(tmp_path / "dense"), tasks, ["local_word"])
    chances = [[x[0] for x in responses(one, "local_word")] for one in (found, other)]
    assert not np.allclose(*chances, atol=1e-2, rtol=0)


def test_a_tokenizer_that_begins_texts(tasks, torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        # transformers draws ids without text too, as only random models do
        vocab_size=_TOKENS,
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=52,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.ndim > 1 else 1.0, 0.2)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    write_tokenizer(folder, _TOKENS)
    file = str(folder / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(file)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        special_tokens=[(END_OF_TEXT, inner.token_to_id(END_OF_TEXT))],
    )
    inner.save(file)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {**settings, "chat_template": STRICT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run = tmp_path / "run"
    result = seqeff("import", folder, run)
    assert result.status == 0, result.errors
    assert harness_model(run).tok_encode("a")[0] == harness_model(run).prefix_token_id
    found, hf = evaluated(harness_model(run), tasks), theirs(folder)
    equal(found, evaluated(hf, tasks))
    # stop strings have ended some of them
    written = responses(found, "local_answer")
    assert len(set(map(len, written))) > 2, written

    # the template begins texts itself, and its end of text is one token
    chat = ChatTemplate.load(RunDirectory(run).tokenizer)
    model, answering = harness_model(run, chat), ("local_choice", "local_answer")
    begin = model.prefix_token_id
    told = model.apply_chat_template([{"role": "user", "content": "a"}])
    assert model.tok_encode(told).count(begin) == 1
    talked = evaluated(model, tasks, answering, shots=1, chat=True)
    equal(talked, evaluated(hf, tasks, answering, shots=1, chat=True))
    assert responses(talked, "local_choice") != responses(found, "local_choice")
