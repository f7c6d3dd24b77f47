"""Exported models that are more than a family's, run by transformers: the same logits and text."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hugging_face import LENGTH, VOCABULARY, logits_of, make_run, model_of
from tiny_run import files_of, seqeff
from variants import LOW_RANK, MASKED

from seqeff.data import Tokenizer
from seqeff.inference import Engine, Request, Sampling

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

# without, random models write one token for ever
PENALTY = 3.0
MODELS = MASKED | LOW_RANK
CASES = ("gpt-neox, bounded, full layers", "llama, all kinds")
COMPACT = ("gpt-neox, compact", "llama, compact, scaled")
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY - 20, (2, 41))
PROMPT = 9


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def load(torch, tmp_path_factory):
    """A function that loads a directory together with its code."""
    transformers = pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        copies = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", copies)

        def load(folder, **changes):
            model, notes = transformers.AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=True, output_loading_info=True, **changes
            )
            assert not any(notes[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            return model.eval()

        yield load


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function of a case: the run, and the directory that it is exported to."""
    made = {}

    def save(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("saved")
            run = make_run(folder / "run", MODELS[case][1])
            result = seqeff("export", run.path, "--to", "hf", "--output", folder / "hf")
            assert result.status == 0, result.errors
            made[case] = run, folder / "hf"
        return made[case]

    return save


def greedy(model, torch, tokens, **settings):
    """The greedy continuation of rows of the same length."""
    found = model.generate(
        torch.tensor(tokens),
        max_new_tokens=LENGTH - tokens.shape[1],
        do_sample=False,
        repetition_penalty=PENALTY,
        # as the engine, none that the tokenizer lacks
        suppress_tokens=list(range(VOCABULARY - 20, VOCABULARY)),
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return found[:, tokens.shape[1] :].tolist()


def engine_greedy(run, prompt):
    """What our engine writes; up to the end of text, if it comes to that."""
    model, parameters = model_of(run.path)
    engine = Engine(model, Tokenizer.load(run.tokenizer), context=LENGTH, chunks=(8,))
    sampling = Sampling(temperature=0.0, repetition_penalty=PENALTY)
    request = Request(prompt=prompt, tokens=LENGTH - len(prompt), sampling=sampling)
    return [
        token
        for piece in engine.stream(engine.prepare(parameters), [request])
        for token in piece.tokens
    ]


@pytest.mark.parametrize("case", MODELS)
def test_logits_are_ours(case, saved, load, torch):
    run, folder = saved(case)
    expected = logits_of(run.path, TOKENS)
    assert np.std(expected) > 0.1
    for attention in ("sdpa", "eager"):
        model = load(folder, attn_implementation=attention)
        assert type(model).__name__ == MODELS[case][0]
        with torch.no_grad():
            found = model(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_mask_matters(case, saved, load, torch):
    """Else the tests would pass without it."""
    model = load(saved(case)[1])
    masks = model.masks(torch.tensor(TOKENS))
    causal = torch.full((41, 41), torch.finfo(masks.dtype).min).triu(1)
    with torch.no_grad():
        found = model(torch.tensor(TOKENS)).logits
        model.masks = lambda *_, **__: causal.expand_as(masks)
        dense = model(torch.tensor(TOKENS)).logits
    assert (found - dense)[:, 20:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("case", COMPACT)
def test_the_turns_matter(case, saved, load, torch):
    model, tokens = load(saved(case)[1]), torch.tensor(TOKENS)
    masks, turns = model.masks(tokens), model.turns(tokens)
    with torch.no_grad():
        found = model(tokens).logits
        unturned = turns._replace(queries=0 * turns.queries, keys=0 * turns.keys)
        absolute = model(tokens, attention_mask=masks, turns=unturned).logits
        with pytest.raises(ValueError, match="give turns"):
            model(tokens, attention_mask=masks)
    assert (found - absolute)[:, 20:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("case", CASES + COMPACT)
def test_it_writes_what_the_engine_writes(case, saved, load, torch):
    run, folder = saved(case)
    model = load(folder)
    theirs = greedy(model, torch, TOKENS[:, :PROMPT])
    for row, tokens in enumerate(TOKENS[:, :PROMPT].tolist()):
        ours = engine_greedy(run, tokens)
        assert len(set(ours)) > 5
        assert ours == theirs[row][: len(ours)]
    assert theirs[0] != theirs[1]
    assert theirs == greedy(model, torch, TOKENS[:, :PROMPT], use_cache=False)


@pytest.mark.parametrize("case", CASES + COMPACT)
def test_padding_on_the_left_changes_nothing(case, saved, load, torch):
    model = load(saved(case)[1])
    padded = np.zeros((2, 23), int)
    padded[0], padded[1, 6:] = TOKENS[0, :23], TOKENS[1, :17]
    mask = torch.ones(2, 23, dtype=torch.int64)
    mask[1, :6] = 0
    with torch.no_grad():
        together = model(torch.tensor(padded), attention_mask=mask).logits
        alone = model(torch.tensor(TOKENS[1:, :17])).logits
    torch.testing.assert_close(together[1, 6:], alone[0], atol=1e-5, rtol=1e-5)
    found = greedy(model, torch, padded, attention_mask=mask)
    assert found[0] == greedy(model, torch, padded[:1])[0]
    assert found[1] == greedy(model, torch, TOKENS[1:, :17])[0][: len(found[1])]


def test_beams_need_no_more_than_the_ids(saved, load, torch):
    model = load(saved("llama, all kinds")[1])
    beams = [greedy(model, torch, TOKENS[:, :9], num_beams=3, use_cache=x) for x in (True, False)]
    assert beams[0] == beams[1] != greedy(model, torch, TOKENS[:, :9])


@pytest.mark.parametrize("case", ["gpt-neox, bounded, full layers", "gpt-neox, compact"])
def test_token_by_token_with_masks(case, saved, load, torch):
    model, tokens = load(saved(case)[1]), torch.tensor(TOKENS)
    cache, logits = None, []
    with torch.no_grad():
        whole = model(tokens).logits
        for end in range(1, 42):
            step = model(
                tokens[:, end - 1 : end],
                attention_mask=model.masks(tokens[:, :end], rows=1),
                turns=model.turns(tokens[:, :end], rows=1),
                position_ids=torch.tensor([[end - 1]]),
                use_cache=True,
                **({} if cache is None else {"past_key_values": cache}),
            )
            cache = step.past_key_values
            logits.append(step.logits)
        torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="call generate"):
            model(tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize("case", ["llama, all kinds", "llama, compact, scaled"])
def test_gradients_do_not_depend_on_checkpointing(case, saved, load, torch):
    model, tokens = load(saved(case)[1]), torch.tensor(TOKENS)

    def gradient():
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        model(tokens.flip(-1))  # whose masks must not be taken
        loss.backward()
        return model.model.embed_tokens.weight.grad.clone()

    expected = gradient()
    assert expected.abs().max() > 1e-3
    model.train()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected)


def test_what_has_no_such_mask_is_refused(saved, load, torch):
    folder = saved("llama, all kinds")[1]
    model, tokens = load(folder), torch.tensor(TOKENS)
    packed = torch.arange(41).remainder(20).expand(2, -1)
    with pytest.raises(ValueError, match="give each a row of its own"):
        model(tokens, position_ids=packed)
    for settings, message in (
        ({"cache_implementation": "static"}, "leave cache_implementation"),
        ({"prefill_chunk_size": 4}, "no prefill_chunk_size"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, max_new_tokens=2, **settings)
    with pytest.raises((ValueError, ImportError)):
        load(folder, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="flex_attention"):
        load(folder, attn_implementation="flex_attention")


def test_without_its_code_it_is_not_loaded(saved):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(
            saved("llama, all kinds")[1], trust_remote_code=False
        )


def test_what_transformers_saves_comes_in_again(saved, load, torch, tmp_path):
    run, folder = saved("gpt-neox, bounded, full layers")
    load(folder).save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "saved")
    again = load(tmp_path / "saved")
    with torch.no_grad():
        logits = again(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, logits_of(run.path, TOKENS), atol=1e-4, rtol=1e-4)
    result = seqeff("import", tmp_path / "saved", tmp_path / "back")
    assert result.status == 0, result.errors
    np.testing.assert_array_equal(logits_of(tmp_path / "back", TOKENS), logits_of(run.path, TOKENS))
    result = seqeff("export", tmp_path / "back", "--to", "hf", "--output", tmp_path / "out")
    # transformers writes its settings of generation, which come along
    name = "generation_config.json"
    settings = {name: files_of(tmp_path / "saved")[name]}
    assert files_of(tmp_path / "out") == files_of(folder) | settings


ALONE = """
import json, sys
for name in ("seqeff", "seqeff_kernels", "jax"):
    sys.modules[name] = None
import torch, transformers
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits
print(json.dumps([logits.tolist(), tokenizer("the cat")["input_ids"]]))
"""


def test_it_needs_nothing_of_ours(saved, tmp_path):
    pytest.importorskip("transformers")
    run, folder = saved("gpt-neox, bounded, full layers")
    moved = shutil.copytree(folder, tmp_path / "moved")
    command = [sys.executable, "-c", ALONE, moved, json.dumps(TOKENS.tolist())]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    ended = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    logits, ids = json.loads(ended.stdout.splitlines()[-1])
    np.testing.assert_allclose(logits, logits_of(run.path, TOKENS), atol=1e-4, rtol=1e-4)
    assert ids == Tokenizer.load(run.tokenizer).encode("the cat")
