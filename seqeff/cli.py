"""The command line: `seqeff train | eval | generate | import | export | info | bench`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import seqeff
from seqeff.checks import UserError, flatten

if TYPE_CHECKING:
    from seqeff import training
    from seqeff.config import LoadedConfig
    from seqeff.data import Tokenizer
    from seqeff.inference import Named, Piece
    from seqeff.models import TransformerConfig
    from seqeff.runs import RunDirectory
    from seqeff.training.program import Program

_OVERRIDES = "any number of --gin.NAME=VALUE change bindings of the config"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for a mistake of the user's."""
    # a host's log lines about its devices would tear the progress bar
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from seqeff.config import split_overrides

        overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options, unknown = _parser().parse_known_args(rest)
        if unknown:
            raise UserError(_unrecognized(unknown, options))
        if overrides and not options.takes_overrides:
            raise UserError(f"{options.name} takes no --gin overrides")
        return options.run(options, overrides)
    except UserError as error:
        print(f"seqeff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # whoever read the output has gone; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Tells a mistake on one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        # what stands after `--streaming` is a book, and after `--retrieval` a task
        if self.prog == "seqeff eval" and "RUN_DIR" in message:
            message += " (before --streaming BOOK... or --retrieval TASK...)"
        chosen = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = _nearest(chosen[1], re.findall(r"[\w-]+", chosen[2])) if chosen else ""
        raise UserError(f"{message}{near}; see {self.prog} --help")


def _unrecognized(arguments: Sequence[str], options: argparse.Namespace) -> str:
    """The error of arguments that a command does not have, with what the first may have meant."""
    first = arguments[0].partition("=")[0]
    if first.startswith("--") and "." in first and options.takes_overrides:
        near = f"; did you mean --gin.{arguments[0].removeprefix('--')}?"
    else:
        near = _nearest(first, re.findall(r"--[a-z][\w-]*", options.parser.format_help()))
    return f"unrecognized arguments: {' '.join(arguments)}{near}; see {options.name} --help"


def _nearest(name: str, candidates: Sequence[str]) -> str:
    from seqeff.config.modules import nearest_name

    return nearest_name(name, candidates)


_USUAL_ROW = 8192
_METHODS = ("dense", "streamingllm", "own")
# prompts that are continued at a time
_SLOTS = 16
# what the tokens of a cache are a multiple of
_ROUNDED = 256


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="seqeff",
        description="Language models that spend less per token of context.",
        epilog=_OVERRIDES,
    )
    version = f"seqeff {seqeff.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: object, text: str, overrides: bool = False, among: Any = commands
    ) -> argparse.ArgumentParser:
        epilog = _OVERRIDES if overrides else None
        sub = among.add_parser(name, help=text, description=text, epilog=epilog)
        sub.set_defaults(run=run, name=sub.prog, parser=sub, takes_overrides=overrides)
        return sub

    train = command("train", _train, "Train from a gin config, or go on with a run.", True)
    train.add_argument("config", type=Path, help="a gin file, such as configs/quickstart.gin")
    train.add_argument(
        "--run-dir",
        type=Path,
        help="where the run is kept; one that exists is resumed, with the overrides that it was "
        "given, which those given now replace (default: a new one under runs/)",
    )
    train.add_argument("--dry-run", action="store_true", help="sizes and costs, no training")
    _add_checkpoint(train)

    text = "Score a run on its held-out documents, on long texts as streams, or on retrieval."
    evaluate = command("eval", _evaluate, text, True)
    text = "the run's directory; give it before --streaming and --retrieval"
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)
    evaluate.add_argument("--batches", type=_positive, help="at most so many batches")
    text = "scores of so many equal parts of the rows too, by the tokens' places in their documents"
    evaluate.add_argument("--positions", type=_positive, metavar="PARTS", help=text)
    text = "read these texts as streams, in constant memory, with and without separators"
    evaluate.add_argument("--streaming", nargs="+", type=Path, metavar="BOOK", help=text)
    text = "with --streaming: the model without a stream, StreamingLLM, its own (default: all)"
    evaluate.add_argument("--method", nargs="+", choices=_METHODS, help=text)
    text = "with --streaming: besides, streams that go on from book to book"
    evaluate.add_argument("--carry", action="store_true", help=text)
    text = "with --streaming: lines of the books too, before that of their method"
    evaluate.add_argument("--per-book", action="store_true", help=text)
    text = "with --streaming: tokens taken at a time (default: 512)"
    evaluate.add_argument("--chunk", type=_positive, help=text)
    text = "with --streaming: keep the streams in this folder, and go on from there"
    evaluate.add_argument("--state", type=Path, metavar="FOLDER", help=text)
    text = "ask for what stands in long contexts: passkey, needle, mqar... (README.md has all)"
    evaluate.add_argument("--retrieval", nargs="+", metavar="TASK", help=text)
    text = "with --retrieval: of prompt and answer (default: the run's row)"
    evaluate.add_argument("--lengths", nargs="+", type=_positive, metavar="TOKENS", help=text)
    text = "with --retrieval: where answers stand, from 0 to 1 (default: 0 0.25 0.5 0.75 1)"
    evaluate.add_argument("--depths", nargs="+", type=float, metavar="DEPTH", help=text)
    text = "with --retrieval: of each task, length and depth (default: 10)"
    evaluate.add_argument("--examples", type=_positive, help=text)
    text = "with --retrieval: another one gives other examples (default: 0)"
    evaluate.add_argument("--seed", type=int, help=text)
    text = "with --retrieval: hide what is asked in this text"
    evaluate.add_argument("--filler", type=Path, metavar="FILE", help=text)
    text = "with --retrieval: prompts at a time (default: 16)"
    evaluate.add_argument("--slots", type=_positive, help=text)
    text = "with --retrieval: a heat map of what is found"
    evaluate.add_argument("--plot", type=Path, metavar="FILE.png", help=text)
    text = "write the results to this file"
    evaluate.add_argument("--json", type=Path, help=text)
    _add_checkpoint(evaluate)

    text = "Continue prompts with a run's model."
    generate = command("generate", _generate, text, True)
    text = "the run's directory"
    generate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="printed before its continuation")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt of any length")
    text = (
        "a JSON object a line, with prompt and perhaps id, tokens, stop and the settings below in "
        "place of those given; -: the standard input"
    )
    prompt.add_argument("--prompts", metavar="FILE.jsonl", help=text)
    generate.add_argument("--tokens", type=_positive, default=200, help="at most (default: 200)")
    text = "of prompt and continuation, where caches grow (default: the run's row)"
    generate.add_argument("--context", type=_positive, metavar="TOKENS", help=text)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    generate.add_argument("--top-k", type=_positive, help="draw among the likeliest (default: all)")
    text = "draw among the likeliest that together have this probability (default: all)"
    generate.add_argument("--top-p", type=float, metavar="P", help=text)
    text = "draw among those at least P times as likely as the likeliest (default: all)"
    generate.add_argument("--min-p", type=float, metavar="P", help=text)
    text = "above 1: tokens that occurred are less likely (default: 1)"
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help=text)
    text = "end before this text; any number of times"
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)
    text = "another one draws another continuation (default: 0)"
    generate.add_argument("--seed", type=int, default=0, help=text)
    text = "with --prompts: prompts at a time (default: 16)"
    generate.add_argument("--slots", type=_positive, help=text)
    text = "with --prompts: where results go, a JSON object a line (default: the standard output)"
    generate.add_argument("--output", type=Path, metavar="FILE.jsonl", help=text)
    text = "with --prompts: the tokens' ids and log-probabilities too"
    generate.add_argument("--log-probabilities", action="store_true", help=text)
    _add_checkpoint(generate)

    text = "Make a run directory of a model of Hugging Face transformers."
    importing = command("import", _import, text)
    text = (
        "a directory with config.json, weights and a tokenizer, or OWNER/NAME[@REVISION] of the hub"
    )
    importing.add_argument("source", metavar="HF_DIR", help=text)
    text = "the run directory to make"
    importing.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)

    text = "Write a run's model for other frameworks."
    exporting = command("export", _export, text)
    text = "the run's directory"
    exporting.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)
    text = "hf: a directory that Hugging Face transformers loads"
    exporting.add_argument("--to", choices=("hf",), required=True, help=text)
    text = "the directory to make (default: RUN_DIR/hf)"
    exporting.add_argument("--output", type=Path, metavar="DIRECTORY", help=text)
    choices = ("float32", "bfloat16", "float16")
    text = "type of the weights (default: float32, that of training)"
    exporting.add_argument("--dtype", choices=choices, default="float32", help=text)
    text = "upload it to the hub too, as a private model if the name is new"
    exporting.add_argument("--push", metavar="OWNER/NAME", help=text)
    _add_checkpoint(exporting)

    text = "Which methods, backends and devices are available here, and why not."
    info = command("info", _info, text)
    info.add_argument(
        "--separators",
        type=Path,
        metavar="TOKENIZER",
        help="list the separators of a tokenizer instead: of a run directory, a tokenizer.json, or "
        "the directory that holds one",
    )
    text = "with --separators: text files in which to measure how many tokens are separators"
    info.add_argument("texts", nargs="*", type=Path, metavar="FILE", help=text)

    text = "Measure speed on this machine."
    bench = commands.add_parser("bench", help=text, description=text)
    kinds = bench.add_subparsers(required=True, metavar="BENCHMARK")
    text = "Training steps of configs, on random tokens."
    steps = command("train", _bench_train, text, True, among=kinds)
    steps.add_argument("configs", nargs="+", type=Path, help="gin files, one row each")
    steps.add_argument("--steps", type=_positive, default=20, help="timed steps (default: 20)")
    text = "Prompts and their continuations, of random tokens, through the caches of configs."
    continuing = command("generate", _bench_generate, text, True, among=kinds)
    continuing.add_argument("configs", nargs="+", type=Path, help="gin files, one row each")
    for name, default, text in (
        ("batch", 1, "rows"),
        ("prompt", 2048, "tokens of a row's prompt"),
        ("tokens", 1000, "tokens that a row is continued by"),
        ("chunk", 512, "tokens of a prompt taken at a time"),
    ):
        text = f"{text} (default: {default})"
        continuing.add_argument(f"--{name}", type=_positive, default=default, help=text)
    batches = command("data", _bench_data, "Batches of synthetic text.", among=kinds)
    text = "Separator attention against cuDNN's dense causal one, on a GPU."
    attention = command("attention", _bench_attention, text, among=kinds)
    attention.add_argument(
        "--window", nargs="+", type=_positive, default=[64], help="tokens (default: 64)"
    )
    attended = ("separators", "bounded", "compact", "bounded-compact", "window")
    text = "what is attended (default: separators)"
    attention.add_argument("--kind", nargs="+", choices=attended, default=["separators"], help=text)
    backends = ("mosaic", "triton", "auto")
    attention.add_argument(
        "--backend", nargs="+", choices=backends, default=backends, help="(default: all)"
    )
    attention.add_argument("--rivals", action="store_true", help="PyTorch too, where it is here")
    text = "Decoding attention against the bandwidth of a GPU's memory."
    decode = command("decode", _bench_decode, text, among=kinds)
    for benchmark in (attention, decode):
        text = "by name (default: those of experiments/attention_speed)"
        benchmark.add_argument("shapes", nargs="*", metavar="SHAPE", help=text)
    for benchmark in (steps, continuing, batches, attention, decode):
        benchmark.add_argument("--json", type=Path, help="write the results to this file")
        benchmark.add_argument("--commit", help="kept in the file (default: what git says)")
    return parser


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff import training
    from seqeff.runs import Origin, RunDirectory
    from seqeff.training.program import prepare_backend

    run = RunDirectory(options.run_dir) if options.run_dir else None
    resumed = run if run is not None and run.exists() else None
    _check_config_file(options.config)
    # the run's own copy first: an outside module that both name is then the given one's
    before = _load(resumed.operative_config, (), resumed).root if resumed else None
    loaded = _load(options.config, overrides, run, _earlier_overrides(options.config, resumed))
    config: training.Train = loaded.root
    if resumed is not None:
        _check_same_run(resumed, before, config)
        resumed.check_modules(loaded.modules)
    kept = loaded.overrides[: len(loaded.overrides) - len(overrides)]
    if options.dry_run:
        _tell_kept(kept)
        with _naming_macros(loaded):
            return _dry_run(config)
    prepare_backend(config)
    if run is None and jax.distributed.is_initialized():
        raise UserError("a run on many hosts needs --run-dir: one directory that all of them see")
    run = run or RunDirectory(_fresh_directory(options.config))
    origin = Origin(loaded.text, loaded.operative, loaded.overrides, loaded.modules)
    with run.lock():
        if run.exists() != (resumed is not None):
            raise UserError(f"another process has just begun a run in {run.path}; start again")
        if not jax.distributed.is_initialized() or jax.process_index() == 0:
            _tell_kept(kept)
        with _naming_macros(loaded):
            outcome = training.train(config, run, origin, checkpoint=options.checkpoint)
    if jax.process_index() == 0:
        other_length = any(name.startswith("Train.steps=") for name in loaded.overrides)
        print(_summary(options.config, config, run, outcome, other_length))
    return 0


def _check_config_file(path: Path) -> None:
    """Refuses what a run directory holds in place of the config that the run was started from."""
    from seqeff.runs import RunDirectory

    there = RunDirectory(path.parent)
    if path.is_dir():
        directory = RunDirectory(path)
        if directory.exists():
            command = f"seqeff train CONFIG --run-dir {shlex.quote(str(path))}"
            raise UserError(f"{path} is a run directory; to go on with it: {command}")
        raise UserError(f"{path} is a directory; give a gin file")
    if there.exists() and there.config.name == path.name:
        raise UserError(
            f"{path} is a run's record of several files, without its overrides; train from the "
            f"file that its first line names, or from {_shown(there.operative_config)}"
        )


def _earlier_overrides(config: Path, resumed: RunDirectory | None) -> Path | None:
    """The file of the overrides that a run has, unless the config holds them already."""
    if resumed is None or config.absolute() == resumed.operative_config:
        return None
    return resumed.overrides if resumed.overrides.exists() else None


def _tell_kept(overrides: Sequence[str]) -> None:
    if overrides:
        words = shlex.join(f"--gin.{override}" for override in overrides)
        print(f"with the run's own overrides: {words}", file=sys.stderr)


@contextlib.contextmanager
def _naming_macros(loaded: LoadedConfig) -> Iterator[None]:
    """Adds to an error of a field the macro that gives it."""
    try:
        yield
    except UserError as error:
        field = re.match(r"(\w+\.\w+) = ", str(error))
        if field is None or field[1] not in loaded.macros:
            raise
        macro = loaded.macros[field[1]]
        raise UserError(f"{error}; it is %{macro}: give --gin.{macro}=VALUE") from error


def _summary(
    path: Path,
    config: training.Train,
    run: RunDirectory,
    outcome: training.Outcome,
    other_length: bool,
) -> str:
    """How a run ended, and what to type next."""
    directory = shlex.quote(_shown(run.path))
    again = f"  seqeff train {shlex.quote(str(path))} --run-dir {directory}"
    if not outcome.complete:
        return f"stopped after step {outcome.step}; go on with\n{again}"
    lines = []
    if outcome.sample is not None:
        lines += ["", outcome.sample, ""]
    if outcome.validation is not None:
        found = outcome.validation.bits_per_byte
        line = f"validation: loss {outcome.validation.loss:.4f}, {found:.3f} bits per byte"
        # the range is that of the config's own number of steps
        if config.expected_bits_per_byte is not None and not other_length:
            low, high = config.expected_bits_per_byte
            verdict = "as expected" if low <= found <= high else "NOT as expected"
            line += f", {verdict} ({low} to {high})"
        lines.append(line)
    lines += [
        f"run directory: {_shown(run.path)}",
        "next:",
        f'  seqeff generate {directory} --prompt "The "',
        f"  seqeff eval {directory}",
        f"{again} --gin.Train.steps={2 * config.steps}",
    ]
    return "\n".join(lines)


def _dry_run(config: training.Train) -> int:
    from seqeff.training.plan import describe

    print(describe(config))
    return 0


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff.bench.report import write_report
    from seqeff.data import place, prepare_validation
    from seqeff.evaluation import Perplexity, make_evaluate

    _check_evaluation(options)
    run, config, tokenizer = _open(options, overrides)
    if options.streaming:
        return _stream(options, overrides, run, config, tokenizer)
    if options.retrieval:
        return _retrieve(options, overrides, run, config, tokenizer)
    if any(getattr(x, "cache_entries", None) is not None for x in config.model.attentions()):
        print(
            "seqeff: held-out rows are scored with the mask, not with the cache of "
            "SeparatorAttention.cache_entries; --streaming BOOK... reads through that",
            file=sys.stderr,
        )
    batches = prepare_validation(config.data, tokenizer, run.data_fingerprint())
    if batches is None:
        raise UserError("the run has no validation documents: Data.holdout is 0")
    length, parts = config.data.sequence_length, options.positions or 1
    if parts > length:
        raise UserError(f"--positions {parts} is more positions than the {length} of a row")
    program, parameters = _restore(run, config, tokenizer, options.checkpoint)
    count = min(len(batches), options.batches or len(batches))
    with jax.set_mesh(program.mesh):
        found = make_evaluate(program.graph, tokenizer.byte_lengths(), parts)(
            parameters, (place(batches, index, program.batch_sharding) for index in range(count))
        )
    result = Perplexity.total(found)
    print(
        f"loss {result.loss:.4f}\nperplexity {result.perplexity:.2f}\n"
        f"bits per byte {result.bits_per_byte:.4f}\ntokens {result.tokens}\nbytes {result.bytes}\n"
        f"entries read {result.entries_read:.1f}\nentries resident {result.resident}"
    )
    rows: list[dict[str, Any]] = [result.as_metrics()]
    if options.positions:
        print(f"{'positions':>15}{'tokens':>12}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}")
        # a place belongs to the part of which it is no less than the beginning
        edges = [-(-part * length // parts) for part in range(parts + 1)]
        for part, (first, end) in zip(found, itertools.pairwise(edges), strict=True):
            rows.append({"positions": [first, end - 1]} | part.as_metrics())
            print(
                f"{f'{first}-{end - 1}':>15}{part.tokens:12,}{part.loss:9.4f}"
                f"{part.perplexity:12.2f}{part.bits_per_byte:11.4f}"
            )
    facts = {"run": str(run.path), "overrides": overrides, "data": run.data_fingerprint()}
    write_report(options.json, "perplexity", rows, facts)
    return 0


def _check_evaluation(options: argparse.Namespace) -> None:
    """Refuses options that would do nothing."""
    if options.streaming and options.retrieval:
        raise UserError("--streaming and --retrieval are two commands; leave one out")
    for kind, name in itertools.product(("streaming", "retrieval"), ("batches", "positions")):
        if getattr(options, kind) and getattr(options, name):
            raise UserError(f"--{name} is of held-out documents; leave it out with --{kind}")
    for name in ("method", "carry", "per_book", "chunk", "state"):
        if getattr(options, name) and not options.streaming:
            raise UserError(f"--{name.replace('_', '-')} is for --streaming BOOK...; give both")
    for name in ("lengths", "depths", "examples", "seed", "filler", "slots", "plot"):
        if getattr(options, name) is not None and not options.retrieval:
            raise UserError(f"--{name} is for --retrieval TASK...; give both")


def _stream(
    options: argparse.Namespace,
    overrides: Sequence[str],
    run: RunDirectory,
    config: training.Train,
    tokenizer: Tokenizer,
) -> int:
    import jax

    from seqeff.bench.report import write_report
    from seqeff.evaluation import Stream, StreamResult, comparison, require_positions
    from seqeff.training.program import run_model

    model, sizes = run_model(config, tokenizer.vocabulary()), tokenizer.byte_lengths()
    wanted = options.method or _METHODS
    variants = comparison.methods(model)
    own = list(variants)[-1]
    streams = {
        name: Stream(variant, sizes, options.chunk or 512)
        for name, variant in variants.items()
        if name.lower() in wanted or (name == own and "own" in wanted)
    }
    if not streams and "dense" not in wanted:
        raise UserError(f"this attention has no stream but its own, {own}; give --method own")
    books = comparison.read_books(tokenizer, options.streaming)
    length = config.data.sequence_length
    if streams:
        require_positions(model, books, options.carry)
        longest = (sum if options.carry else max)(len(book.tokens) for book in books)
        if told := comparison.warning(model, longest, length):
            print(f"seqeff: {told}", file=sys.stderr)
    program, parameters = _restore(run, config, tokenizer, options.checkpoint)
    rows: dict[str, list[StreamResult]] = {}
    results = []
    print(comparison.HEADER, flush=True)
    with jax.set_mesh(program.mesh):
        for method, book, result in comparison.compare(
            model,
            streams,
            parameters,
            tokenizer,
            books,
            length=length if "dense" in wanted else None,
            carry=options.carry,
            state=options.state,
        ):
            found = rows.setdefault(method, [])
            found.append(result)
            results.append({"method": method, "book": book.name, **result.as_metrics()})
            write_report(options.json, "streaming", results, {"overrides": overrides})
            if options.per_book:
                print(comparison.line(f"  {book.name}"[:21], result), flush=True)
            if len(found) == len(books):
                print(comparison.line(method, StreamResult.total(found)), flush=True)
    return 0


def _retrieve(
    options: argparse.Namespace,
    overrides: Sequence[str],
    run: RunDirectory,
    config: training.Train,
    tokenizer: Tokenizer,
) -> int:
    import jax

    from seqeff.bench.report import write_report
    from seqeff.evaluation import comparison
    from seqeff.evaluation.retrieval import ModelReader, command
    from seqeff.training.checkpoints import CheckpointStore

    command.check_files(options.json, options.plot)
    length = config.data.sequence_length
    grid = command.grid(
        options.retrieval,
        lengths=options.lengths or [length],
        depths=options.depths,
        examples=options.examples,
        seed=options.seed,
        filler=options.filler,
    )
    model = config.model.for_vocabulary(tokenizer.vocabulary())
    model.require_positions(max(grid.lengths))
    cells = list(grid.cells(tokenizer))
    if told := comparison.warning(model, max(grid.lengths), length):
        print(f"seqeff: {told}", file=sys.stderr)
    program, parameters = _restore(run, config, tokenizer, options.checkpoint)
    with CheckpointStore(run.checkpoints) as store:
        latest = store.latest()
    facts = command.facts(grid, config.model, tokenizer) | {
        "run": str(run.path),
        "checkpoint": latest if options.checkpoint is None else options.checkpoint,
        "overrides": overrides,
    }
    groups = [cell.examples for cell in cells]
    slots = options.slots or _SLOTS
    with jax.set_mesh(program.mesh):
        command.run(
            ModelReader.fitting(program.model, parameters, tokenizer, groups, slots),
            cells,
            lambda results: write_report(options.json, "retrieval", results, facts),
            options.plot,
        )
    return 0


def _generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff.inference import Engine, check_room, generation_context, most_kept_by

    for name in ("slots", "output", "log_probabilities"):
        if getattr(options, name) and options.prompts is None:
            raise UserError(f"--{name.replace('_', '-')} is for --prompts FILE.jsonl; give both")
    requests = _text_requests(options)
    run, config, tokenizer = _open(options, overrides)
    named = requests(tokenizer)
    model, length = config.model.for_vocabulary(tokenizer.vocabulary()), config.data.sequence_length
    context = generation_context(model, options.context or length)
    if context is None and options.context:
        raise UserError("--context is for caches that grow; this model's do not: leave it out")
    for _, request in named:
        check_room(request, context)
    program, parameters = _restore(run, config, tokenizer, options.checkpoint)
    _tell_room(model, named, context, length)
    engine = Engine(
        program.model,
        tokenizer,
        slots=min(options.slots or _SLOTS, len(named)),
        context=None if context is None else _room(named, context),
        kept=most_kept_by(program.model, (request for _, request in named)),
    )
    with jax.set_mesh(program.mesh):
        pieces = engine.stream(parameters, (request for _, request in named))
        if options.prompts is None:
            print(options.prompt or "", end="", flush=True)
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
    return 0


def _text_requests(options: argparse.Namespace) -> Callable[[Tokenizer], list[Named]]:
    """What makes the requests once there is a tokenizer; settings are checked before."""
    from seqeff.data.files import decode_utf8, read_bytes
    from seqeff.inference import Named, Request, Sampling, read_requests, to_request

    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    defaults = Request(
        prompt=(0,),
        tokens=options.tokens,
        sampling=Sampling(**{name: getattr(options, name) for name in fields}),
        stops=tuple(options.stop),
    )
    if options.prompts is not None:
        return lambda tokenizer: read_requests(options.prompts, tokenizer, defaults)
    text = options.prompt
    if options.prompt_file is not None:
        text = decode_utf8(read_bytes(options.prompt_file), str(options.prompt_file))
    return lambda tokenizer: [Named(1, to_request(tokenizer, text, defaults))]


def _room(named: Sequence[Named], context: int) -> int:
    """As much of a context as the prompts need; one of few numbers, as each compiles."""
    most = max(len(request.prompt) + request.tokens for _, request in named)
    return min(context, -(-most // _ROUNDED) * _ROUNDED)


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


def _import(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff import config, interop
    from seqeff.interop import hub
    from seqeff.models.flops import parameter_count
    from seqeff.runs import Origin, RunDirectory, write_atomically

    run, directory = RunDirectory(options.run_dir), Path(options.source).absolute()
    origin = str(directory)
    if hub.is_name(options.source):
        directory = hub.pull(options.source)
        origin = f"{options.source.partition('@')[0]}@{directory.name}"
    with interop.open_model(directory) as model, run.lock():
        if run.exists():
            raise UserError(f"{options.run_dir} holds a run already; choose another directory")
        text = f"# imported from {origin}\n\n"
        text += config.write(model.train_config(run))
        with run.writing():
            write_atomically(run.config, text)
        model.write(run, Origin(text, config.load(run.config).operative))
        count, length = parameter_count(model.config), model.length
    shown = shlex.quote(_shown(run.path))
    generate = f'  seqeff generate {shown} --prompt "The "'
    evaluate = (
        f"  seqeff eval {shown} --gin.Data.validation='@TextFiles()' "
        "--gin.TextFiles.paths=\"('FILE',)\""
    )
    if length > _USUAL_ROW:
        # rows of the whole length would often not fit
        evaluate += f" --gin.Data.sequence_length={_USUAL_ROW}"
    print(
        f"{count:,} parameters, rows of {length:,} tokens\n"
        f"run directory: {_shown(run.path)}\nnext:\n{generate}\n{evaluate}"
    )
    return 0


def _export(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff import interop
    from seqeff.interop import hub

    run, config, tokenizer = _open(options, ())
    output = options.output or run.path / options.to
    family = interop.export_model(
        run,
        config.model,
        config.data.sequence_length,
        tokenizer,
        output,
        checkpoint=options.checkpoint,
        dtype=options.dtype,
    )
    print(f"{family.architecture}: {_shown(output.absolute())}")
    if options.push is not None:
        print(hub.push(output, options.push))
    return 0


def _info(options: argparse.Namespace, _: Sequence[str]) -> int:
    if options.separators is not None:
        from seqeff.analysis import separators

        print(separators.describe(_tokenizer_path(options.separators), options.texts))
        return 0
    if options.texts:
        raise UserError("texts are for --separators TOKENIZER; give it, or leave them out")
    from seqeff.info import describe

    print(describe())
    return 0


def _tokenizer_path(path: Path) -> Path:
    """A tokenizer's file or directory; a run directory's own."""
    from seqeff.config.modules import nearest_path
    from seqeff.runs import RunDirectory

    run = RunDirectory(path)
    if run.exists():
        return run.tokenizer
    if path.exists():
        return path
    where = RunDirectory(path.parent)
    near = f"; the run's is {_shown(where.tokenizer)}" if where.exists() else nearest_path(path)
    raise UserError(f"--separators {path}: no such file or directory{near}")


def _bench_train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from seqeff.bench.train import benchmark_training

    loaded = [(str(path), _load(path, overrides, None).root) for path in options.configs]
    results = benchmark_training(loaded, options.steps)
    return _tell_speed("train", results, options, {"overrides": overrides})


def _bench_generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from seqeff.bench.commands import generate

    generate(
        [(str(path), _load(path, overrides, None).root) for path in options.configs],
        options.batch,
        options.prompt,
        options.tokens,
        options.chunk,
        overrides,
        options.json,
        options.commit,
    )
    return 0


def _bench_data(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff.bench.data import benchmark_batches

    results = [row._asdict() for row in benchmark_batches()]
    return _tell_speed("data", results, options)


def _bench_attention(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff.bench.commands import attention

    attention(
        options.shapes,
        options.window,
        options.kind,
        options.backend,
        options.rivals,
        options.json,
        options.commit,
    )
    return 0


def _bench_decode(options: argparse.Namespace, _: Sequence[str]) -> int:
    from seqeff.bench.commands import decode

    decode(options.shapes, options.json, options.commit)
    return 0


def _tell_speed(
    benchmark: str,
    results: Sequence[Mapping[str, Any]],
    options: argparse.Namespace,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    from seqeff.bench.report import write_report

    write_report(options.json, benchmark, results, facts, options.commit)
    for row in results:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    return 0


def _open(
    options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[RunDirectory, training.Train, Tokenizer]:
    """A run directory, its config with the overrides, and its tokenizer; touches no device."""
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory

    run = RunDirectory(options.run_dir).require()
    config = _load(run.operative_config, overrides, run).root
    return run, config, Tokenizer.load(run.tokenizer)


def _restore(
    run: RunDirectory, config: training.Train, tokenizer: Tokenizer, checkpoint: int | None
) -> tuple[Program, Any]:
    """The compiled functions of a run, and the parameters of one of its checkpoints."""
    import jax

    from seqeff.training.checkpoints import CheckpointStore
    from seqeff.training.mesh import MeshConfig, find_devices
    from seqeff.training.program import Program, prepare_backend

    prepare_backend(config)
    # a run made on many devices is read on those here that share its batch
    mesh = MeshConfig(data=1, fsdp=math.gcd(len(find_devices()), config.data.batch_size))
    program = Program(dataclasses.replace(config, mesh=mesh), tokenizer.vocabulary())
    with jax.set_mesh(program.mesh), CheckpointStore(run.checkpoints) as store:
        wanted = {"parameters": program.abstract_state["parameters"]}
        state, _ = store.restore(checkpoint, wanted, partial=True)
    return program, state["parameters"]


def _load(
    path: Path,
    overrides: Sequence[str],
    run: RunDirectory | None,
    earlier: Path | None = None,
) -> LoadedConfig:
    from seqeff.config import load

    module_paths = [run.modules] if run is not None else []
    return load(path, overrides, module_paths=module_paths, earlier=earlier)


def _check_same_run(run: RunDirectory, before: object, config: object) -> None:
    """Refuses to go on with a run under another model, data or optimizer."""
    from seqeff.training import MAY_CHANGE

    old, new = flatten(before), flatten(config)
    differing = []
    for path in sorted(old.keys() | new.keys()):
        free = any(f"{path}.".startswith(f"{name}.") for name in MAY_CHANGE)
        if not free and old.get(path) != new.get(path):
            parent, _, field = path.rpartition(".")
            owner = new.get(parent) or old.get(parent) or type(config).__name__
            differing.append(f"{owner}.{field} = {new.get(path)!r} (there {old.get(path)!r})")
    if differing:
        raise UserError(
            f"{_shown(run.path)} holds another run; choose another --run-dir, or undo "
            + ", ".join(differing)
        )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="use this one (default: the latest)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _fresh_directory(config: Path) -> Path:
    """A new directory under runs/, named after the config and the time; nobody else gets it."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for count in itertools.count(1):
        path = Path("runs") / f"{config.stem}-{stamp}{'' if count == 1 else f'-{count}'}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make a run directory {path}: {error.strerror}") from error
        return path
    raise AssertionError


def _shown(path: Path) -> str:
    """A path as short as it can be from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())
