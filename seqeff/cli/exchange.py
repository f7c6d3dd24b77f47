"""`seqeff import` and `seqeff export`."""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqeff.checks import UserError
from seqeff.cli import stablehlo
from seqeff.cli.parser import Commands, add_checkpoint
from seqeff.cli.runs import open_run, shown

if TYPE_CHECKING:
    from seqeff import training
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory

_USUAL_ROW = 8192


def add(commands: Commands) -> None:
    """The command and its arguments."""
    text = "Make a run directory of a model of Hugging Face transformers."
    importing = commands.add("import", _import, text)
    text = (
        "a directory with config.json, weights and a tokenizer, or OWNER/NAME[@REVISION] of the hub"
    )
    importing.add_argument("source", metavar="HF_DIR", help=text)
    text = "the run directory to make"
    importing.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)

    text = "Write a run's model for other frameworks."
    exporting = commands.add("export", _export, text, True)
    text = "the run's directory"
    exporting.add_argument("run_dir", type=Path, metavar="RUN_DIR", help=text)
    text = (
        "hf: a directory that Hugging Face transformers loads; stablehlo: prefill and decode step, "
        "which jax loads alone"
    )
    exporting.add_argument("--to", choices=("hf", "stablehlo"), required=True, help=text)
    text = "the directory to make (default: RUN_DIR/hf or RUN_DIR/stablehlo)"
    exporting.add_argument("--output", type=Path, metavar="DIRECTORY", help=text)
    choices = ("float32", "bfloat16", "float16")
    text = "hf: type of the weights (default: float32, that of training)"
    exporting.add_argument("--dtype", choices=choices, help=text)
    stablehlo.add_options(exporting)
    text = "upload it to the hub too, as a private model if the name is new"
    exporting.add_argument("--push", metavar="OWNER/NAME", help=text)
    add_checkpoint(exporting)


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
    directory = shlex.quote(shown(run.path))
    generate = f'  seqeff generate {directory} --prompt "The "'
    evaluate = (
        f"  seqeff eval {directory} --gin.Data.validation='@TextFiles()' "
        "--gin.TextFiles.paths=\"('FILE',)\""
    )
    if length > _USUAL_ROW:
        # rows of the whole length would often not fit
        evaluate += f" --gin.Data.sequence_length={_USUAL_ROW}"
    print(
        f"{count:,} parameters, rows of {length:,} tokens\n"
        f"run directory: {shown(run.path)}\nnext:\n{generate}\n{evaluate}"
    )
    return 0


def _export(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from seqeff.interop import hub

    stablehlo.check_options(options)
    if options.push is not None:
        hub.check_new_name(options.push)
    run, config, tokenizer = open_run(options, overrides)
    output = options.output or run.path / options.to
    write = stablehlo.write if options.to == "stablehlo" else _write_hf
    if options.push is None or not output.is_dir():
        print(write(options, run, config, tokenizer, output))
    else:
        _check_same(output, lambda path: write(options, run, config, tokenizer, path))
        print(f"{shown(output.absolute())} holds this export already")
    if options.push is not None:
        print(hub.push(output, options.push))
    return 0


def _check_same(output: Path, write: Callable[[Path], object]) -> None:
    """Refuses a directory that is not what an export writes, as an upload that failed leaves it."""
    from seqeff.checks import writing

    remedy = "or choose another --output"
    with contextlib.ExitStack() as stack:
        with writing(f"beside {output}", remedy):
            folder = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
        again = Path(stack.enter_context(folder)) / output.name
        write(again)
        names = [
            {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
            for folder in (again, output)
        ]
        if names[0] != names[1] or not all(
            filecmp.cmp(again / name, output / name, shallow=False) for name in names[0]
        ):
            raise UserError(f"{output} exists already, with another content; give another --output")


def _write_hf(
    options: argparse.Namespace,
    run: RunDirectory,
    config: training.Train,
    tokenizer: Tokenizer,
    output: Path,
) -> str:
    from seqeff import interop

    exported = interop.export_model(
        run,
        config.model,
        config.data.sequence_length,
        tokenizer,
        output,
        checkpoint=options.checkpoint,
        dtype=options.dtype or "float32",
    )
    said = f"{exported.architecture}: {shown(output.absolute())}"
    if exported.merged:
        own, written = exported.parameters
        names = ", ".join(exported.merged)
        said += f"\nmultiplied out: {names}; {written:,} parameters instead of {own:,}"
    return said
