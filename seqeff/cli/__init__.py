"""The command line: `seqeff train | eval | generate | import | export | info | bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import seqeff
from seqeff.checks import UserError
from seqeff.cli import bench, evaluate, exchange, generate, info, train
from seqeff.cli.parser import OVERRIDES, Commands, Parser, unrecognized


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for a mistake of the user's."""
    # a host's log lines about its devices would tear the progress bar
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from seqeff.config import split_overrides

        overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options, unknown = _parser().parse_known_args(rest)
        if unknown:
            raise UserError(unrecognized(unknown, options))
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="seqeff",
        description="Language models that spend less per token of context.",
        epilog=OVERRIDES,
    )
    version = f"seqeff {seqeff.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = Commands(parser, "COMMAND")
    for module in (train, evaluate, generate, exchange, info, bench):
        module.add(commands)
    return parser
