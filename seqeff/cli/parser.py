"""Arguments, and what is said of wrong ones."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from seqeff.checks import UserError

OVERRIDES = "any number of --gin.NAME=VALUE change bindings of the config"
# prompts that are continued at a time
SLOTS = 16


class Commands:
    """What takes the commands of a program, or of a command that has some."""

    def __init__(self, parser: argparse.ArgumentParser, metavar: str) -> None:
        self._parsers = parser.add_subparsers(required=True, metavar=metavar)

    def add(
        self, name: str, run: object, text: str, overrides: bool = False
    ) -> argparse.ArgumentParser:
        """The parser of a command, which takes its arguments.

        Args:
          run: a function of the options and the overrides, which gives the exit status.
          text: what it does, a sentence.
          overrides: whether it takes `--gin` ones.
        """
        epilog = OVERRIDES if overrides else None
        parser = self._parsers.add_parser(name, help=text, description=text, epilog=epilog)
        parser.set_defaults(run=run, name=parser.prog, parser=parser, takes_overrides=overrides)
        return parser

    def group(self, name: str, text: str, metavar: str) -> Commands:
        """A command with commands of its own."""
        return Commands(self._parsers.add_parser(name, help=text, description=text), metavar)


class Parser(argparse.ArgumentParser):
    """Tells a mistake on one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        # what stands after `--streaming` is a book, and after the others a task
        if self.prog == "seqeff eval" and "RUN_DIR" in message:
            message += " (before --streaming BOOK..., --retrieval TASK... or --harness TASK...)"
        chosen = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = _nearest(chosen[1], re.findall(r"[\w-]+", chosen[2])) if chosen else ""
        raise UserError(f"{message}{near}; see {self.prog} --help")


def unrecognized(arguments: Sequence[str], options: argparse.Namespace) -> str:
    """The error of arguments that a command does not have, with what the first may have meant."""
    first = arguments[0].partition("=")[0]
    if first.startswith("--") and "." in first and options.takes_overrides:
        near = f"; did you mean --gin.{arguments[0].removeprefix('--')}?"
    else:
        # the help is named in any case
        near = _nearest(first, re.findall(r"--(?!help\b)[a-z][\w-]*", options.parser.format_help()))
    if first.startswith("--") and options.takes_overrides and not near:
        near = "; a field of the config is given as --gin.CLASS.FIELD=VALUE"
    return f"unrecognized arguments: {' '.join(arguments)}{near}; see {options.name} --help"


def _nearest(name: str, candidates: Sequence[str]) -> str:
    from seqeff.config.modules import nearest_name

    return nearest_name(name, candidates)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_output_file(
    parser: argparse.ArgumentParser, name: str, text: str, metavar: str | None = None
) -> None:
    """A file to write, whose help tells the rule of them all: a file is replaced, whole.

    What makes a directory (`export`, `import`) leaves one that is there alone.
    """
    text += "; one that is there is replaced once there is something to write"
    parser.add_argument(name, type=_output_file, metavar=metavar, help=text)


def state_folder(text: str) -> Path:
    """A folder that is made where it is absent."""
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; give a folder")
    return folder


def _output_file(text: str) -> Path:
    """A file that can be written once there is something to write."""
    file = Path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file in it")
    if not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {file.parent}; make it")
    return file


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="use this one (default: the latest)"
    )
