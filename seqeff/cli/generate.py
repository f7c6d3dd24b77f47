"""`seqeff generate`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqeff.checks import UserError
from seqeff.cli.parser import SLOTS, Commands, add_checkpoint, add_output_file, positive
from seqeff.cli.runs import open_run

if TYPE_CHECKING:
    from seqeff.data import ChatTemplate, Tokenizer
    from seqeff.inference import Named, Piece, Sampling
    from seqeff.models import TransformerConfig


def add(commands: Commands) -> None:
    """The command and its arguments."""
    text = "Continue prompts with a run's model."
    generate = commands.add("generate", _generate, text, True)
    text = "the run's directory"
    generate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="printed before its continuation")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt of any length")
    text = (
        "a JSON object a line, with prompt, or messages of role and content, and perhaps id, "
        "tokens, stop and the settings below in place of those given; -: the standard input"
    )
    prompt.add_argument("--prompts", metavar="FILE.jsonl", help=text)
    generate.add_argument("--tokens", type=positive, default=200, help="at most (default: 200)")
    text = "of prompt and continuation, where caches grow (default: the run's row)"
    generate.add_argument("--context", type=positive, metavar="TOKENS", help=text)
    text = "0: greedy (default, as of the other settings: the run's Sampling, else 0.8)"
    generate.add_argument("--temperature", type=float, help=text)
    generate.add_argument("--top-k", type=positive, help="draw among the likeliest (default: all)")
    text = "draw among the likeliest that together have this probability (default: all)"
    generate.add_argument("--top-p", type=float, metavar="P", help=text)
    text = "draw among those at least P times as likely as the likeliest (default: all)"
    generate.add_argument("--min-p", type=float, metavar="P", help=text)
    text = "above 1: tokens that occurred are less likely (default: 1)"
    generate.add_argument("--repetition-penalty", type=float, metavar="X", help=text)
    text = "end before this text; any number of times"
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)
    text = "another one draws another continuation (default: 0)"
    generate.add_argument("--seed", type=int, help=text)
    text = "with --prompts: prompts at a time (default: 16)"
    generate.add_argument("--slots", type=positive, help=text)
    text = (
        "with --prompts: where results go, a JSON object a line (default: the standard output); "
        "FILE.jsonl.partial until all are there"
    )
    add_output_file(generate, "--output", text, "FILE.jsonl")
    text = "with --prompts: the tokens' ids and log-probabilities too"
    generate.add_argument("--log-probabilities", action="store_true", help=text)
    text = "prompts are what a user says, as the tokenizer's chat template writes it"
    generate.add_argument("--apply-chat-template", action="store_true", help=text)
    add_checkpoint(generate)


def _generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff.data import ChatTemplate
    from seqeff.inference import Engine, check_room, failures, generation_context
    from seqeff.training.restore import restore

    for name in ("slots", "output", "log_probabilities"):
        if getattr(options, name) and options.prompts is None:
            raise UserError(f"--{name.replace('_', '-')} is for --prompts FILE.jsonl; give both")
    if options.output is not None and options.output.resolve() == Path(options.prompts).resolve():
        raise UserError(f"--output {options.output} would replace the prompts; give another file")
    run, config, tokenizer = open_run(options, overrides)
    chat = ChatTemplate.load(run.tokenizer) if options.apply_chat_template else None
    named = _requests(options, config.sampling, tokenizer, chat)
    model, length = config.model.for_vocabulary(tokenizer.vocabulary()), config.data.sequence_length
    context = generation_context(model, options.context or length)
    if context is None and options.context:
        raise UserError("--context is for caches that grow; this model's do not: leave it out")
    for _, request in named:
        check_room(request, context)
    program, parameters = restore(run, config, tokenizer, options.checkpoint)
    _tell_room(model, named, context, length)
    engine = Engine.for_requests(
        program.model,
        tokenizer,
        (request for _, request in named),
        slots=options.slots or SLOTS,
        context=context,
    )
    with jax.set_mesh(program.mesh):
        pieces = engine.stream(engine.prepare(parameters), (request for _, request in named))
        if options.prompts is None:
            # an answer is no continuation of the question's text
            print("" if chat else options.prompt or "", end="", flush=True)
            for piece in pieces:
                print(piece.text, end="", flush=True)
            print(flush=True)
        else:
            _write_results(options, named, pieces)
    use = engine.use
    print(
        f"seqeff: {use.tokens:,} tokens read {use.read / use.tokens:,.1f} entries a layer in the "
        f"mean; a layer held {use.resident:,} at most",
        file=sys.stderr,
    )
    if told := failures(engine.ended):
        print(f"seqeff: {told}", file=sys.stderr)
        return 1
    return 0


def _requests(
    options: argparse.Namespace,
    sampling: Sampling,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
) -> list[Named]:
    """What is to be continued, drawn as the run's `sampling` says where the options do not."""
    from seqeff.data.files import decode_utf8, read_bytes
    from seqeff.inference import Named, Request, read_requests, to_request

    fields = [field.name for field in dataclasses.fields(sampling)]
    given = {name: x for name in fields if (x := getattr(options, name)) is not None}
    defaults = Request(
        prompt=(0,),
        tokens=options.tokens,
        sampling=dataclasses.replace(sampling, **given),
        stops=tuple(options.stop),
    )
    if options.prompts is not None:
        return read_requests(options.prompts, tokenizer, defaults, chat)
    text = options.prompt
    if options.prompt_file is not None:
        text = decode_utf8(read_bytes(options.prompt_file), str(options.prompt_file))
    return [Named(1, to_request(tokenizer, text, defaults, chat))]


def _tell_room(
    model: TransformerConfig, named: Sequence[Named], context: int | None, length: int
) -> None:
    """Says which prompts leave too little room in the context, and which positions are new.

    Args:
      length: of the rows that the model was trained on.
    """
    from seqeff.evaluation.comparison import warning

    whole = [len(request.prompt) + request.tokens for _, request in named]
    if context is not None and max(whole) > context:
        short = [request for (_, request), size in zip(named, whole, strict=True) if size > context]
        room, others = context - len(short[0].prompt), ""
        if len(short) > 1:
            others = f", and for {len(short) - 1:,} other prompts too few"
        print(
            f"seqeff: the context of {context:,} leaves room for {room:,} of "
            f"{short[0].tokens:,} tokens{others}; --context gives more",
            file=sys.stderr,
        )
    if told := warning(model, min(max(whole), context or max(whole)), length):
        print(f"seqeff: {told}", file=sys.stderr)


def _write_results(
    options: argparse.Namespace, named: Sequence[Named], pieces: Iterable[Piece]
) -> None:
    """Writes a line a request; a file is complete, or called `.partial`."""
    import json

    from tqdm import tqdm

    from seqeff.checks import writing
    from seqeff.inference import results

    names = [name for name, _ in named]
    bar = tqdm(total=len(names), unit=" prompts", disable=None, dynamic_ncols=True)

    def told(piece: Piece) -> None:
        bar.update(piece.reason is not None)

    with contextlib.ExitStack() as stack:
        file, output = sys.stdout, options.output
        if output is not None:
            stack.enter_context(writing(str(output), "or choose another --output"))
            partial = output.with_name(f"{output.name}.partial")
            file = stack.enter_context(open(partial, "w", encoding="utf-8"))
        stack.enter_context(bar)
        for result in results(
            names, pieces, log_probabilities=options.log_probabilities, told=told
        ):
            print(json.dumps(result, ensure_ascii=False), file=file, flush=True)
        if output is not None:
            file.close()
            os.replace(partial, output)
