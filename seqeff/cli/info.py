"""`seqeff info`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from seqeff.checks import UserError
from seqeff.cli.parser import Commands
from seqeff.cli.runs import shown


def add(commands: Commands) -> None:
    """The command and its arguments."""
    text = "Which methods, backends and devices are available here, and why not."
    info = commands.add("info", _info, text)
    info.add_argument(
        "--separators",
        type=Path,
        metavar="TOKENIZER",
        help="list the separators of a tokenizer instead: of a run directory, a tokenizer.json, or "
        "the directory that holds one",
    )
    text = "with --separators: text files in which to measure how many tokens are separators"
    info.add_argument("texts", nargs="*", type=Path, metavar="FILE", help=text)


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
    near = f"; the run's is {shown(where.tokenizer)}" if where.exists() else nearest_path(path)
    raise UserError(f"--separators {path}: no such file or directory{near}")
