"""`seqeff export --to stablehlo`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from seqeff.checks import UserError
from seqeff.cli.parser import positive
from seqeff.cli.runs import shown

if TYPE_CHECKING:
    from seqeff import training
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory

_OPTIONS = ("weights", "backend", "sizes")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Arguments of this form alone."""
    text = "stablehlo: one file beside the functions, or inside each of them (default: beside)"
    parser.add_argument("--weights", choices=("beside", "inside"), help=text)
    text = "stablehlo: of attention; but for xla, of the device here (default: xla, of any)"
    choices = ("xla", "auto", "triton", "mosaic")
    parser.add_argument("--backend", choices=choices, help=text)
    text = "stablehlo: batch=N length=N and so on, for compilers and kernels that want fixed ones"
    parser.add_argument("--sizes", nargs="+", type=_size, metavar="NAME=N", help=text)


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that are of another form than the one that is asked for."""
    others = ("dtype",) if options.to == "stablehlo" else _OPTIONS
    for name in others:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is not for --to {options.to}; leave it out")
    if options.backend not in (None, "xla") and options.sizes is None:
        raise UserError(
            f"--backend {options.backend} takes kernels, which are of fixed sizes: give them, "
            "such as --sizes batch=1 length=128 context=1024"
        )


def write(
    options: argparse.Namespace,
    run: RunDirectory,
    config: training.Train,
    tokenizer: Tokenizer,
    output: Path,
) -> str:
    """Writes a run's model; what is said of it."""
    from seqeff.interop.stablehlo import EXAMPLE, export_functions

    functions = export_functions(
        run,
        config.model,
        config.data.sequence_length,
        tokenizer,
        output,
        checkpoint=options.checkpoint,
        weights=options.weights or "beside",
        backend=options.backend or "xla",
        sizes=None if options.sizes is None else dict(options.sizes),
    )
    sizes = [name if size is None else f"{name} {size}" for name, size in functions.sizes.items()]
    listed = f"{', '.join(sizes[:-1])} and {sizes[-1]}"
    directory, example = output.absolute(), shlex.quote(shown(output.absolute() / EXAMPLE))
    return (
        f"prefill and decode of {'any ' if options.sizes is None else ''}{listed}: "
        f'{shown(directory)}\nnext:\n  python {example} "The "'
    )


def _size(text: str) -> tuple[str, int]:
    name, sign, number = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=N, such as batch=1")
    size = positive(number)
    if size >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} must be below 2**31")
    return name, size
