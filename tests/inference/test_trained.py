"""A run in Python, as the README has it, gives what the command does."""

import jax
import pytest
from tiny_run import seqeff

from seqeff.checks import UserError
from seqeff.inference import Engine, Request, Sampling, load_run


def test_a_run_in_python_gives_what_the_command_gives(finished):
    config, tokenizer, parameters, mesh = load_run(finished)
    engine = Engine(config, tokenizer, context=64)
    prompt = [tokenizer.begin_of_text, *tokenizer.encode("the ")]
    request = Request(prompt=prompt, tokens=9, sampling=Sampling(temperature=0.0))
    with jax.set_mesh(mesh):
        pieces = list(engine.stream(engine.prepare(parameters), [request]))
    command = ("generate", finished, "--prompt", "the ", "--tokens", 9, "--temperature", 0)
    assert seqeff(*command).output == "the " + "".join(piece.text for piece in pieces) + "\n"


def test_overrides_and_what_is_no_run(finished, tmp_path):
    assert load_run(finished, overrides=["TransformerConfig.unroll=2"]).config.unroll == 2
    with pytest.raises(UserError):
        load_run(tmp_path / "absent")
    with pytest.raises(UserError):
        load_run(finished, checkpoint=1)
