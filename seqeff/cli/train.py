"""`seqeff train`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqeff.checks import UserError, flatten
from seqeff.cli.parser import Commands, add_checkpoint
from seqeff.cli.runs import load, shown

if TYPE_CHECKING:
    from seqeff import training
    from seqeff.config import LoadedConfig
    from seqeff.runs import RunDirectory

# of the fields in which two configs differ
_TOLD = 5


def add(commands: Commands) -> None:
    """The command and its arguments."""
    train = commands.add("train", _train, "Train from a gin config, or go on with a run.", True)
    train.add_argument("config", type=Path, help="a gin file, such as configs/quickstart.gin")
    train.add_argument(
        "--run-dir",
        type=Path,
        help="where the run is kept; one that exists is resumed, with the overrides that it was "
        "given, which those given now replace (default: a new one under runs/)",
    )
    train.add_argument("--dry-run", action="store_true", help="sizes and costs, no training")
    add_checkpoint(train)


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from seqeff import training
    from seqeff.runs import Origin, RunDirectory
    from seqeff.training.program import prepare_backend

    run = RunDirectory(options.run_dir) if options.run_dir else None
    resumed = run if run is not None and run.exists() else None
    _check_config_file(options.config)
    # the run's own copy first: an outside module that both name is then the given one's
    before = load(resumed.operative_config, (), resumed).root if resumed else None
    loaded = load(options.config, overrides, run, _earlier_overrides(options.config, resumed))
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
            f"file that its first line names, or from {shown(there.operative_config)}"
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
    directory = shlex.quote(shown(run.path))
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
        f"run directory: {shown(run.path)}",
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


def _check_same_run(run: RunDirectory, before: object, config: object) -> None:
    """Refuses to go on with a run under another model, data or optimizer."""
    from seqeff.training import MAY_CHANGE

    old, new = flatten(before), flatten(config)
    differing: list[str] = []
    replaced: tuple[str, ...] = ()
    for path in sorted(old.keys() | new.keys()):
        free = any(f"{path}.".startswith(f"{name}.") for name in MAY_CHANGE)
        # the fields of another class say nothing further
        if not free and old.get(path) != new.get(path) and not path.startswith(replaced):
            replaced += (f"{path}.",)
            said = f"{_field(path, old | new, type(config).__name__)} = {new.get(path)!r}"
            differing.append(f"{said} (there {old.get(path)!r})")
    if differing:
        further = len(differing) - _TOLD
        raise UserError(
            f"{shown(run.path)} holds another run; choose another --run-dir, or undo "
            + ", ".join(differing[:_TOLD])
            + (f" and {further:,} more" if further > 0 else "")
        )


def _field(path: str, values: Mapping[str, Any], root: str) -> str:
    """A path as the field of a class, and what of its items it is."""
    items: list[str] = []
    owner = None
    while owner is None:
        path, _, name = path.rpartition(".")
        items.insert(0, name)
        owner = values.get(path) if path else root
    return f"{owner}.{items[0]}" + "".join(f"[{item}]" for item in items[1:])


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
