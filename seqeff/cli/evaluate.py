"""`seqeff eval`."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqeff.checks import UserError
from seqeff.cli.parser import (
    SLOTS,
    Commands,
    add_checkpoint,
    add_output_file,
    positive,
    share,
    state_folder,
)
from seqeff.cli.runs import facts, open_with

if TYPE_CHECKING:
    from seqeff.evaluation import StreamResult
    from seqeff.models import TransformerConfig

_METHODS = ("dense", "streamingllm", "own")
_HARNESS = ("include_path", "limit", "shots", "context", "seed", "slots", "apply_chat_template")
# what is evaluated in place of held-out rows: how that is asked for, and what options it takes
_KINDS = {
    "streaming": ("BOOK", ("positions", "plot", "method", "carry", "per_book", "chunk", "state")),
    "retrieval": ("TASK", ("lengths", "depths", "examples", "seed", "filler", "slots", "plot")),
    "harness": ("TASK", _HARNESS),
}
_HELD_OUT = ("batches", "positions", "plot")


def add(commands: Commands) -> None:
    """The command and its arguments."""
    text = "Score a run on its held-out documents, long texts, retrieval, or lm-evaluation-harness."
    evaluate = commands.add("eval", _evaluate, text, True)
    text = "the run's directory; give it before --streaming, --retrieval and --harness"
    evaluate.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)
    evaluate.add_argument("--batches", type=positive, help="at most so many batches")
    text = (
        "scores of so many equal parts too: of the rows, by the tokens' places in their documents, "
        "or of each text of --streaming"
    )
    evaluate.add_argument("--positions", type=positive, metavar="PARTS", help=text)
    text = "read these texts as streams, in constant memory, with and without separators"
    evaluate.add_argument("--streaming", nargs="+", type=Path, metavar="BOOK", help=text)
    text = "with --streaming: the model without a stream, StreamingLLM, its own (default: all)"
    evaluate.add_argument("--method", nargs="+", choices=_METHODS, help=text)
    text = "with --streaming: besides, streams that go on from book to book"
    evaluate.add_argument("--carry", action="store_true", help=text)
    text = "with --streaming: lines of the books too, before that of their method"
    evaluate.add_argument("--per-book", action="store_true", help=text)
    text = "with --streaming: tokens taken at a time (default: 512)"
    evaluate.add_argument("--chunk", type=positive, help=text)
    text = "with --streaming: keep the streams in this folder, and go on from there"
    evaluate.add_argument("--state", type=state_folder, metavar="FOLDER", help=text)
    text = (
        "ask for what stands in long contexts: passkey, needle, mqar... (README.md has all, and "
        "their settings, such as --gin.AssociativeRecall.pairs=64)"
    )
    evaluate.add_argument("--retrieval", nargs="+", metavar="TASK", help=text)
    text = "with --retrieval: of prompt and answer (default: the run's row)"
    evaluate.add_argument("--lengths", nargs="+", type=positive, metavar="TOKENS", help=text)
    text = "with --retrieval: where answers stand, from 0 to 1 (default: 0 0.25 0.5 0.75 1)"
    evaluate.add_argument("--depths", nargs="+", type=share, metavar="DEPTH", help=text)
    text = "with --retrieval: of each task, length and depth (default: 10)"
    evaluate.add_argument("--examples", type=positive, help=text)
    text = "with --retrieval or --harness: for other examples (default: 0, or the harness's)"
    evaluate.add_argument("--seed", type=int, help=text)
    text = "with --retrieval: hide what is asked in this text"
    evaluate.add_argument("--filler", type=Path, metavar="FILE", help=text)
    text = "with --retrieval or --harness: prompts at a time (default: 16)"
    evaluate.add_argument("--slots", type=positive, help=text)
    text = "draw what is found: with --positions curves, with --retrieval a heat map"
    add_output_file(evaluate, "--plot", text, "FILE.png")
    text = "run tasks of lm-evaluation-harness: their names, patterns of names, or YAML files"
    evaluate.add_argument("--harness", nargs="+", metavar="TASK", help=text)
    text = "with --harness: a folder with YAML files of further tasks"
    evaluate.add_argument("--include-path", type=Path, metavar="FOLDER", help=text)
    text = "with --harness: documents of each task at most"
    evaluate.add_argument("--limit", type=positive, metavar="DOCUMENTS", help=text)
    text = "with --harness: examples before each question (default: as the task says)"
    evaluate.add_argument("--shots", type=int, metavar="EXAMPLES", help=text)
    text = (
        "with --harness: questions are what a user says, and examples an earlier chat, as the "
        "tokenizer's chat template writes them"
    )
    evaluate.add_argument("--apply-chat-template", action="store_true", help=text)
    text = "with --harness: of prompt and answer (default: the positions there are, else the row)"
    evaluate.add_argument("--context", type=positive, metavar="TOKENS", help=text)
    add_output_file(evaluate, "--json", "write the results to this file")
    add_checkpoint(evaluate)


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff.bench.report import write_report
    from seqeff.data import place, prepare_validation
    from seqeff.evaluation import Perplexity, make_evaluate
    from seqeff.evaluation.plot import curves
    from seqeff.training.restore import restore

    _check_evaluation(options)
    if options.streaming:
        return _stream(options, overrides)
    if options.retrieval:
        return _retrieve(options, overrides)
    if options.harness:
        return _run_harness(options, overrides)
    run, loaded, tokenizer = open_with(options, overrides, ())
    config = loaded.root
    _tell_mask(config.model)
    batches = prepare_validation(config.data, tokenizer, run.data_fingerprint())
    if batches is None:
        raise UserError("the run has no validation documents: Data.holdout is 0")
    length, parts = config.data.sequence_length, options.positions or 1
    if parts > length:
        raise UserError(f"--positions {parts} is more positions than the {length} of a row")
    program, parameters = restore(run, config, tokenizer, options.checkpoint)
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
    rows = [row | {"sha256": batches.sha256} for row in rows]
    write_report(options.json, "perplexity", rows, facts(options, run, loaded, tokenizer))
    if options.plot:
        middles = [length * (part + 0.5) / parts for part in range(parts)]
        curves(middles, {run.path.name: found}, "tokens of context", options.plot)
    return _tell_broken([result.loss])


def _check_evaluation(options: argparse.Namespace) -> None:
    """Refuses options that would do nothing."""
    given = [kind for kind in _KINDS if getattr(options, kind)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} are two commands; leave one out")
    kind = given[0] if given else None
    taken = _HELD_OUT if kind is None else _KINDS[kind][1]
    for name in dict.fromkeys([*_HELD_OUT, *(x for _, names in _KINDS.values() for x in names)]):
        value = getattr(options, name)
        if value is None or value is False or name in taken:
            continue
        if kind is not None and name in _HELD_OUT:
            raise UserError(f"--{name} is not for --{kind}; leave one out")
        usage = [f"--{kind} {what}..." for kind, (what, names) in _KINDS.items() if name in names]
        raise UserError(f"--{name.replace('_', '-')} is for {' or '.join(usage)}; give both")
    if options.plot is not None:
        from seqeff.evaluation.plot import check_plot

        if not options.positions and not options.retrieval:
            raise UserError(f"--plot {options.plot} draws --positions PARTS; give both")
        check_plot(options.plot)


def _stream(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff.bench.report import write_report
    from seqeff.evaluation import Stream, StreamResult, comparison, read_books, require_positions
    from seqeff.evaluation.plot import curves
    from seqeff.training.program import run_model
    from seqeff.training.restore import restore

    run, loaded, tokenizer = open_with(options, overrides, ())
    config = loaded.root
    model, sizes = run_model(config, tokenizer.vocabulary()), tokenizer.byte_lengths()
    wanted, parts = options.method or _METHODS, options.positions or 1
    variants = comparison.methods(model)
    own = list(variants)[-1]
    streams = {
        name: Stream(variant, sizes, options.chunk or 512, parts)
        for name, variant in variants.items()
        if name.lower() in wanted or (name == own and "own" in wanted)
    }
    if not streams and "dense" not in wanted:
        raise UserError(f"this attention has no stream but its own, {own}; give --method own")
    books = read_books(tokenizer, options.streaming)
    length = config.data.sequence_length
    if streams:
        require_positions(model, books, options.carry)
        longest = (sum if options.carry else max)(len(book.tokens) for book in books)
        if told := comparison.warning(model, longest, length):
            print(f"seqeff: {told}", file=sys.stderr)
    program, parameters = restore(run, config, tokenizer, options.checkpoint)
    rows: dict[str, list[StreamResult]] = {}
    results = []
    known = facts(options, run, loaded, tokenizer)
    print(comparison.HEADER, flush=True)
    with jax.set_mesh(program.mesh):
        for method, book, result in comparison.compare(
            model,
            streams,
            parameters,
            tokenizer,
            books,
            length=length if "dense" in wanted else None,
            parts=parts,
            carry=options.carry,
            state=options.state,
        ):
            found = rows.setdefault(method, [])
            found.append(result)
            named = {"method": method, "book": book.name, "sha256": book.sha256}
            results.append(named | result.as_metrics())
            write_report(options.json, "streaming", results, known | {"complete": False})
            if options.per_book:
                print(comparison.line(f"  {book.name}"[:21], result), flush=True)
            if len(found) == len(books):
                print(comparison.line(method, StreamResult.total(found)), flush=True)
    write_report(options.json, "streaming", results, known | {"complete": True})
    if options.positions:
        totals = {method: StreamResult.total(found) for method, found in rows.items()}
        print(*comparison.by_part(totals), sep="\n")
        if options.plot:
            middles = [100 * (part + 0.5) / parts for part in range(parts)]
            lines = {method: result.parts for method, result in totals.items()}
            curves(middles, lines, "part of each text, %", options.plot)
    return _tell_broken([x.perplexity.loss for found in rows.values() for x in found])


def _tell_broken(losses: Sequence[float]) -> int:
    """The exit status: 1, and a line that says so, where a loss is no number."""
    broken = sum(not math.isfinite(loss) for loss in losses)
    if broken:
        print(
            f"seqeff: {broken:,} of {len(losses):,} losses are not finite: see to those of the "
            "run, and try an earlier --checkpoint",
            file=sys.stderr,
        )
    return 1 if broken else 0


def _retrieve(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff.bench.report import write_report
    from seqeff.evaluation import comparison
    from seqeff.evaluation.retrieval import ModelReader, Row, command
    from seqeff.training.restore import restore

    given = ("lengths", "depths", "examples", "seed", "filler")
    bindings = command.bindings(
        options.retrieval, **{name: getattr(options, name) for name in given}
    )
    run, loaded, tokenizer = open_with(options, [*bindings, *overrides], ["Retrieval"])
    config, (retrieval,) = loaded.root, loaded.others
    length = config.data.sequence_length
    longest = max(retrieval.lengths, default=length)
    model = config.model.for_vocabulary(tokenizer.vocabulary())
    model.require_positions(longest)
    cells = list(retrieval.cells(tokenizer, length))
    if any(isinstance(x, Row) for cell in cells for x in cell.examples):
        _tell_mask(config.model)
    if told := comparison.warning(model, longest, length):
        print(f"seqeff: {told}", file=sys.stderr)
    program, parameters = restore(run, config, tokenizer, options.checkpoint)
    known = facts(options, run, loaded, tokenizer, examples=retrieval.seed)
    groups = [cell.examples for cell in cells]
    slots = options.slots or SLOTS
    with jax.set_mesh(program.mesh):
        command.run(
            ModelReader(program.model, parameters, tokenizer, groups, slots),
            cells,
            lambda results, complete: write_report(
                options.json, "retrieval", results, known | {"complete": complete}
            ),
            options.plot,
        )
    return 0


def _run_harness(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff.bench.report import write_report
    from seqeff.data import ChatTemplate
    from seqeff.evaluation import comparison
    from seqeff.evaluation.harness import command
    from seqeff.training.restore import restore

    if options.shots is not None and options.shots < 0:
        raise UserError(f"--shots {options.shots} must not be negative")
    seed = options.seed or 0
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} must be at least 0, below 2**32")
    run, opened, tokenizer = open_with(options, overrides, ())
    config = opened.root
    _tell_mask(config.model)
    model, length = config.model.for_vocabulary(tokenizer.vocabulary()), config.data.sequence_length
    context = options.context or model.positions.limit or length
    model.require_positions(context)
    chat = ChatTemplate.load(run.tokenizer) if options.apply_chat_template else None
    loaded = command.load_tasks(
        options.harness, include=options.include_path, shots=options.shots, seed=options.seed
    )
    # needs the package that loads them
    from seqeff.evaluation.harness._model import HarnessModel, check_generation

    check_generation(loaded.tasks["tasks"], tokenizer, context)
    if told := comparison.warning(model, context, length):
        print(f"seqeff: {told}", file=sys.stderr)
    program, parameters = restore(run, config, tokenizer, options.checkpoint)
    with jax.set_mesh(program.mesh):
        found = command.evaluate(
            HarnessModel(
                program.model,
                parameters,
                tokenizer,
                context=context,
                slots=options.slots or SLOTS,
                seed=seed,
                chat=chat,
            ),
            loaded.tasks,
            options.limit,
            chat=chat is not None,
        )
    print(command.table(found))
    known = facts(options, run, opened, tokenizer, **loaded.seeds, sampling=seed) | {
        "limit": options.limit,
        "context": context,
        "chat_template": None if chat is None else chat.sha256,
    }
    write_report(options.json, "harness", command.rows(found), known)
    return 0


def _tell_mask(model: TransformerConfig) -> None:
    """Says that rows are scored in another way than the model decodes, if they are."""
    if any(getattr(x, "cache_entries", None) is not None for x in model.attentions()):
        print(
            "seqeff: whole rows are scored with the mask, not with the cache of "
            "SeparatorAttention.cache_entries; --streaming BOOK... reads through that",
            file=sys.stderr,
        )
