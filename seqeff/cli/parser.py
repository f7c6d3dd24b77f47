"""Arguments, and what is said of wrong ones."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
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
        # what stands after `--streaming` is a book, and after `--retrieval` a task
        if self.prog == "seqeff eval" and "RUN_DIR" in message:
            message += " (before --streaming BOOK... or --retrieval TASK...)"
        chosen = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = _nearest(chosen[1], re.findall(r"[\w-]+", chosen[2])) if chosen else ""
        raise UserError(f"{message}{near}; see {self.prog} --help")


def unrecognized(arguments: Sequence[str], options: argparse.Namespace) -> str:
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


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return found


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="use this one (default: the latest)"
    )
