"""The command: prompts from the line, from files, many at a time, and what it says of them."""

import io
import json
import sys

import pytest
from tiny_run import refused, seqeff

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def test_what_is_not_given_is_as_the_run_draws(finished):
    command = ["generate", finished, "--prompt", "the cat", "--tokens", 8]
    greedy = seqeff(*command, "--temperature", 0).output
    assert seqeff(*command, "--gin.Sampling.temperature=0").output == greedy
    hot = [*command, "--temperature", 1e5]
    assert seqeff(*hot, "--gin.Sampling.top_k=1").output == greedy
    assert seqeff(*hot).output != greedy
    assert seqeff(*hot, "--seed", 1).output == seqeff(*hot, "--gin.Sampling.seed=1").output


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


LINES = [
    {"prompt": "the cat", "tokens": 5},
    {"prompt": "a dog sat on the mat and the cat ran to", "id": "second", "temperature": 0},
    {"prompt": "the", "seed": 3, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    {"prompt": "", "stop": ["cat", "dog"]},
    {"prompt": "big red", "stop": "a", "top_k": 3},
]


def write_lines(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_prompts_of_a_file(finished, tmp_path, monkeypatch):
    file, output = write_lines(tmp_path / "prompts.jsonl", LINES), tmp_path / "results.jsonl"
    command = ["generate", finished, "--tokens", 9, "--slots", 2, "--log-probabilities"]
    done = seqeff(*command, "--prompts", file, "--output", output)
    assert done.status == 0, done.errors
    assert done.output == ""
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["id"] for result in results] == [1, "second", 3, 4, 5]
    assert results[0]["tokens"] == 5 or results[0]["reason"] == "end"
    for line, result in zip(LINES, results, strict=True):
        assert result["reason"] in ("length", "end", "stop")
        assert len(result["token_ids"]) == len(result["log_probabilities"]) == result["tokens"]
        assert all(chance <= 0 for chance in result["log_probabilities"])
        stops = [line["stop"]] if isinstance(line.get("stop"), str) else line.get("stop", [])
        assert not any(stop in result["text"] for stop in stops)
    assert not (tmp_path / "results.jsonl.partial").exists()
    # from the standard input, to the standard output, and all at once
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    again = seqeff(*command[:4], "--prompts", "-")
    assert again.status == 0, again.errors
    short = [
        {name: result[name] for name in ("id", "text", "tokens", "reason")} for result in results
    ]
    assert [json.loads(line) for line in again.output.splitlines()] == short
    # and each as it is alone
    line = LINES[1]
    alone = seqeff(*command[:4], "--prompt", line["prompt"], "--temperature", 0)
    assert alone.output == line["prompt"] + results[1]["text"] + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this is not JSON"),
        ("[]", "line 2: this is no JSON object"),
        ('{"promt": "a"}', "line 2: there is no field 'promt'; did you mean 'prompt'?"),
        ("{}", "line 2: this has neither prompt nor messages"),
        ('{"prompt": 3}', "line 2: prompt is 3: give a text"),
        ('{"prompt": "", "messages": []}', "line 2: this has both prompt and messages"),
        ('{"messages": []}', "line 2: messages is []: give a list of objects"),
        ('{"messages": [{"role": "user"}]}', "each with the texts role and content"),
        ('{"messages": [{"role": "user", "content": 3}]}', "each with the texts role and content"),
        ('{"prompt": "a", "tokens": 0}', "line 2: Request.tokens = 0 must be at least 1"),
        ('{"prompt": "a", "tokens": 1.5}', "line 2: tokens is 1.5: give a whole number"),
        ('{"prompt": "a", "top_k": 3000000000}', "Sampling.top_k = 3000000000 must be at least 1"),
        ('{"prompt": "a", "temperature": 1e300}', "Sampling.temperature = 1e+300 must be from"),
        (
            '{"prompt": "a", "repetition_penalty": 1e-60}',
            "repetition_penalty = 1e-60 must be above",
        ),
        ('{"prompt": "a", "tokens": 3000000000}', "Request.tokens = 3000000000 must be at least 1"),
        ("[" * 100_000, "line 2: this is not JSON"),
        ('{"prompt": "a", "top_p": 2}', "line 2: Sampling.top_p = 2 must be above 0"),
        ('{"prompt": "a", "seed": "x"}', "line 2: Sampling.seed = 'x'"),
        ('{"prompt": "a", "stop": 3}', "line 2: stop is 3: give a text"),
        ('{"prompt": "a", "stop": ""}', "line 2: a stop string is empty"),
        ('{"prompt": "\\ud800"}', "line 2: the prompt is not valid text"),
        ('{"prompt": "a", "id": "\\ud800"}', "line 2: id is '\\ud800': give what JSON can hold"),
        ('{"prompt": "a", "id": NaN}', "line 2: id is nan: give what JSON can hold"),
        ('{"prompt": "a", "id": 1}', "lines 1 and 2: both have the id 1"),
        (json.dumps({"prompt": "the cat " * 40}), "the context of 32 leaves room for 31"),
    ],
)
def test_lines_that_cannot_be(finished, no_devices, tmp_path, line, message):
    file, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    assert message in refused("generate", finished, "--prompts", file, "--output", output)
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_cannot_be(finished, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "has no prompts" in refused("generate", finished, "--prompts", empty)
    assert "cannot read" in refused("generate", finished, "--prompts", tmp_path / "absent")
    file = write_lines(tmp_path / "prompts.jsonl", LINES[:1])
    where = tmp_path / "absent" / "results.jsonl"
    line = refused("generate", finished, "--prompts", file, "--output", where)
    assert f"argument --output: {where}: there is no folder {where.parent}; make it" in line
    for option in (["--slots", 2], ["--output", file], ["--log-probabilities"]):
        line = refused("generate", finished, "--prompt", "a", *option)
        assert f"{option[0]} is for --prompts" in line


def test_a_model_whose_output_is_not_finite(not_finite, tmp_path):
    done = seqeff("generate", not_finite, "--prompt", "the cat", "--tokens", 5)
    assert (done.status, done.output) == (1, "the cat\n")
    assert done.errors.splitlines()[-1].startswith(
        "seqeff: 1 of 1 continuations end early, as the model's output is not finite there"
    )
    file = write_lines(tmp_path / "prompts.jsonl", LINES[:2])
    done = seqeff("generate", not_finite, "--prompts", file)
    assert done.status == 1
    for line in done.output.splitlines():
        result = json.loads(line)
        assert (result["text"], result["tokens"], result["reason"]) == ("", 0, "not finite")


def test_a_chat_template(copied, tmp_path):
    pytest.importorskip("jinja2", reason="comes with the harness extra")
    command = ["generate", copied, "--temperature", 0, "--tokens", 4]
    asked = [*command, "--prompt", " the cat", "--apply-chat-template"]
    assert "has no chat template" in refused(*asked)
    template = "{{ bos_token }}{{ eos_token }}{{ messages[0].content | trim }}"
    (copied / "tokenizer/chat_template.jinja").write_text(template)
    done = seqeff(*asked)
    assert done.status == 0, done.errors
    # the template's tokens, which are here those of a plain prompt
    plain = seqeff(*command, "--prompt", "the cat").output
    assert done.output == plain.removeprefix("the cat") != "\n"
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": " the cat"}])
    lines = seqeff(*command, "--prompts", file, "--apply-chat-template").output
    assert json.loads(lines)["text"] == done.output.removesuffix("\n")
    talk = [{"role": "user", "content": " the cat"}, {"role": "assistant", "content": "sat"}]
    talks = write_lines(tmp_path / "talks.jsonl", [{"messages": talk, "id": "talk"}])
    lines = seqeff(*command, "--prompts", talks, "--apply-chat-template").output
    assert json.loads(lines)["text"] == done.output.removesuffix("\n")
    assert "line 1: messages need a chat template" in refused(*command, "--prompts", talks)
    (copied / "tokenizer/chat_template.jinja").write_text("{{ raise_exception('never') }}")
    line = refused(*command, "--prompts", talks, "--apply-chat-template")
    expected = "the chat template does not take messages of user, assistant: never"
    assert line == f"{talks}, line 1: {expected}"
    line = refused(*command, "--prompts", file, "--apply-chat-template")
    assert line == f"{file}, line 1: the chat template does not take messages of user: never"


def test_a_file_of_results_is_replaced_whole_and_only_by_results(finished, tmp_path):
    file, output = write_lines(tmp_path / "prompts.jsonl", LINES[:1]), tmp_path / "results.jsonl"
    output.write_text("earlier\n" * 9)
    command = ["generate", finished, "--tokens", 3, "--prompts", file]
    assert "leaves room" in refused(*command, "--context", 2, "--output", output)
    assert output.read_text() == "earlier\n" * 9
    assert seqeff(*command, "--output", output).status == 0
    (line,) = output.read_text().splitlines()
    assert json.loads(line)["id"] == 1
    before = file.read_text()
    same = tmp_path / "." / "prompts.jsonl"
    assert "would replace the prompts; give another file" in refused(*command, "--output", same)
    assert file.read_text() == before


def test_prompts_that_are_cut_are_told(finished, tmp_path):
    file = write_lines(tmp_path / "prompts.jsonl", LINES[:3])
    done = seqeff("generate", finished, "--prompts", file, "--tokens", 40)
    assert done.status == 0, done.errors
    assert "of 40 tokens, and for 1 other prompts too few" in done.errors


def test_a_stop_string_of_the_command(finished):
    command = ["generate", finished, "--prompt", "the cat", "--temperature", 0, "--tokens", 12]
    whole = seqeff(*command).output.removeprefix("the cat").rstrip("\n")
    stop = whole[4:6]
    cut = seqeff(*command, "--stop", "never there", "--stop", stop)
    assert cut.output == "the cat" + whole[: whole.index(stop)] + "\n"
    assert "a stop string is empty" in refused(*command, "--stop", "")
