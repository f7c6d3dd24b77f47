"""Generation: what is drawn, when it ends, and the text that comes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import refused, seqeff

from seqeff.checks import ConfigError, UserError
from seqeff.data import Tokenizer
from seqeff.inference import (
    Generator,
    Sampling,
    check_prompt,
    decode_stream,
    generation_context,
)
from seqeff.models import SeparatorAttention
from seqeff.models.flops import entries_of_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT, VOCABULARY, NEVER = 32, 300, -1
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.load().model.make(nnx.Rngs(3))


@pytest.fixture(scope="module")
def stream(tiny, model):
    """A function of (prompt, tokens, sampling, stop) that returns ids."""
    parameters = nnx.to_pure_dict(nnx.split(model)[1])
    generator = Generator(tiny.load().model, VOCABULARY, CONTEXT)
    return lambda prompt, tokens, sampling, stop=NEVER: list(
        generator.stream(parameters, prompt, tokens, sampling, stop)
    )


@nnx.jit
def _logits(model, tokens):
    return model.logits(model(tokens))[0, :, :VOCABULARY]


def next_logits(model, tokens):
    # what follows the tokens changes nothing
    row = np.zeros((1, CONTEXT), np.int32)
    row[0, : len(tokens)] = tokens
    return _logits(model, row)[len(tokens) - 1]


def test_greedy_is_the_argmax_of_the_whole_forward_pass(model, stream):
    prompt = [5, 17, 250]
    expected = list(prompt)
    for _ in range(8):
        expected.append(int(jnp.argmax(next_logits(model, expected))))
    assert stream(prompt, 8, GREEDY) == expected[3:]
    assert stream(prompt, 8, Sampling(temperature=1.0, top_k=1)) == expected[3:]


def test_the_context_is_filled_and_not_exceeded(stream):
    assert len(stream([1, 2], 1000, GREEDY)) == CONTEXT - 2
    assert len(stream(list(range(CONTEXT - 1)), 1000, GREEDY)) == 1


def test_it_ends_before_the_stop_token(stream):
    whole = stream([9], 10, Sampling(seed=1))
    stop = whole[6]
    assert stream([9], 10, Sampling(seed=1), stop) == whole[: whole.index(stop)]


def test_a_seed_gives_the_same_text_and_another_one_other_text(stream):
    assert stream([3], 20, Sampling(seed=4)) == stream([3], 20, Sampling(seed=4))
    assert stream([3], 20, Sampling(seed=4)) != stream([3], 20, Sampling(seed=5))


def test_only_the_likeliest_are_drawn(model, stream):
    likeliest = set(np.argsort(next_logits(model, [3]))[-4:].tolist())
    drawn = {stream([3], 1, Sampling(temperature=5.0, top_k=4, seed=s))[0] for s in range(40)}
    assert drawn == likeliest


def test_draws_follow_the_temperature(model, stream):
    draws = 300
    hot = [stream([3], 1, Sampling(temperature=0.1, top_k=None, seed=s))[0] for s in range(draws)]
    chances = jax.nn.softmax(next_logits(model, [3]) / 0.1)
    likeliest = int(jnp.argmax(chances))
    chance = float(chances[likeliest])
    spread = 4 * np.sqrt(chance * (1 - chance) / draws)
    assert abs(hot.count(likeliest) / draws - chance) < spread


def test_prompts_that_do_not_fit():
    check_prompt([1], 2)
    with pytest.raises(UserError, match="empty"):
        check_prompt([], 8)
    with pytest.raises(UserError, match="8 tokens; the context of 8 leaves room for 7"):
        check_prompt([1] * 8, 8)


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"seed": 2**63}]
)
def test_sampling_that_cannot_be(values):
    with pytest.raises(ConfigError, match=f"Sampling.{next(iter(values))}"):
        Sampling(**values)


def test_text_comes_in_whole_characters(finished):
    tokenizer = Tokenizer.load(finished / "tokenizer")
    text = "a ☃ and 漢字 in it"
    parts = list(decode_stream(tokenizer, tokenizer.encode(text)))
    assert "".join(parts) == text
    assert "" in parts


def test_generate_prints_the_prompt_and_goes_on(finished):
    first = seqeff("generate", finished, "--prompt", "The cat", "--tokens", 6, "--seed", 1)
    assert first.status == 0, first.errors
    assert first.output.startswith("The cat")
    assert len(first.output) > len("The cat\n")
    assert seqeff("generate", finished, "--prompt", "The cat", "--tokens", 6, "--seed", 1) == first
    other = seqeff("generate", finished, "--prompt", "The cat", "--tokens", 6, "--seed", 2)
    assert other.output != first.output
    greedy = [
        seqeff("generate", finished, "--prompt", "the", "--temperature", 0, "--seed", s).output
        for s in (1, 2)
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompt", "the cat " * 40], "tokens; the context of 32 leaves room for 31"),
        (["--prompt", "a", "--temperature", "-1"], "Sampling.temperature = -1.0 must"),
        (
            ["--prompt", "a", "--top-k", "0"],
            "argument --top-k: '0' is not a whole number of at least 1",
        ),
        (["--prompt", "\udcff"], "the prompt is not valid text"),
    ],
)
def test_what_cannot_be_generated(finished, no_devices, options, expected):
    assert expected in refused("generate", finished, *options)


def test_a_longer_context(finished, tmp_path):
    command = ["generate", finished, "--temperature", 0, "--tokens", 40]
    cut = seqeff(*command, "--prompt", "the cat")
    assert cut.status == 0, cut.errors
    assert "the context of 32 leaves room for" in cut.errors
    assert "warning" not in cut.errors
    longer = seqeff(*command, "--prompt", "the cat", "--context", 64)
    assert longer.output.startswith(cut.output.rstrip("\n"))
    assert len(longer.output) > len(cut.output)
    assert "leaves room" not in longer.errors
    assert "in training up to 32" in longer.errors


def test_a_prompt_from_a_file_is_not_repeated(finished, tmp_path):
    command = ["generate", finished, "--temperature", 0, "--tokens", 5]
    file = tmp_path / "prompt.txt"
    file.write_text("the cat sat")
    whole = seqeff(*command, "--prompt", "the cat sat").output
    assert seqeff(*command, "--prompt-file", file).output == whole.removeprefix("the cat sat")
    assert "cannot read" in refused(*command, "--prompt-file", tmp_path / "absent.txt")
    assert "not allowed with" in refused(*command, "--prompt-file", file, "--prompt", "a")


def test_a_checkpoint_that_does_not_exist(finished):
    line = refused("generate", finished, "--prompt", "a", "--checkpoint", 7)
    assert "no checkpoint of step 7; it has 20, 24" in line


BOUNDED = SeparatorAttention(
    window=9, initial_tokens=2, separators=3, separator_ids=(3, 4, 5), positions="compact"
)


@pytest.mark.parametrize(
    "attention",
    [BOUNDED, dataclasses.replace(BOUNDED, positions="absolute")],
    ids=["compact", "absolute"],
)
def test_a_long_prompt_is_continued_as_the_whole_pass_says(tiny, attention, monkeypatch):
    config = dataclasses.replace(tiny.load().model, attention=attention, layer_attention={})
    assert generation_context(config, CONTEXT) is None
    model = config.make(nnx.Rngs(3))
    generator = Generator(config, VOCABULARY, None)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, 1300).tolist()
    rows, extend = [], generator._extend

    def counted(parameters, tokens, *others, **named):
        rows.append(tokens.shape[1])
        return extend(parameters, tokens, *others, **named)

    monkeypatch.setattr(generator, "_extend", counted)
    ids = list(generator.stream(nnx.to_pure_dict(nnx.split(model)[1]), prompt, 6, GREEDY, NEVER))
    # memory is that of a chunk, whatever the prompt
    assert rows == [512, 512, 320, 1, 1, 1, 1, 1]
    whole = [*prompt, *ids]
    taken = jnp.asarray([whole[:-1]])
    entries, _ = entries_of_tokens(config, taken, None)
    assert (generator.use.tokens, generator.use.resident) == (taken.shape[1], 2 + 3 + 9)
    assert generator.use.read == pytest.approx(float(entries.sum()))
    logits = _logits(model, np.asarray([whole], np.int32))[len(prompt) - 1 : -1]
    # each was the likeliest, as near as float32 tells
    chosen = np.take_along_axis(np.asarray(logits), np.asarray(ids)[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, logits.max(1), atol=1e-4)


def test_the_published_cache_generates(finished):
    options = [
        "--gin.TransformerConfig.attention=@SeparatorAttention()",
        "--gin.SeparatorAttention.window=9",
        "--gin.SeparatorAttention.separators=3",
        "--gin.SeparatorAttention.cache_entries=20",
        "--gin.SeparatorAttention.positions=compact",
    ]
    prompt = "the cat sat on a big red mat. " * 5
    result = seqeff("generate", finished, "--prompt", prompt, "--tokens", 5, *options)
    assert result.status == 0, result.errors
    assert result.output.startswith(prompt) and len(result.output) > len(prompt) + 1


def test_a_prompt_of_any_length_where_caches_do_not_grow(finished):
    """Longer than the row of training, in chunks: what follows is what the model says."""
    bounded = [
        "--gin.TransformerConfig.attention=@SeparatorAttention()",
        "--gin.SeparatorAttention.window=9",
        "--gin.SeparatorAttention.separators=3",
    ]
    prompt = "the cat sat on a big red mat. " * 90
    command = ["generate", finished, "--prompt", prompt, "--tokens", 5, "--temperature", 0]
    result = seqeff(*command, *bounded, "--gin.SeparatorAttention.positions=compact")
    assert result.status == 0, result.errors
    assert result.output.startswith(prompt) and len(result.output) > len(prompt) + 1
    assert "warning" not in result.errors
    assert "a layer held 15 at most" in result.errors
    result = seqeff(*command, *bounded)
    assert result.status == 0, result.errors
    assert "warning: positions go up to" in result.errors
    assert "leaves room for" in refused(*command)
    assert "--context is for caches that grow" in refused(*command, *bounded, "--context", 900)
