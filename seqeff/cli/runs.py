"""Runs that commands read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqeff import training
    from seqeff.config import LoadedConfig
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory


def open_run(
    options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[RunDirectory, training.Train, Tokenizer]:
    """A run directory, its config with the overrides, and its tokenizer; touches no device."""
    run, loaded, tokenizer = open_with(options, overrides, ())
    return run, loaded.root, tokenizer


def open_with(
    options: argparse.Namespace, overrides: Sequence[str], others: Sequence[str]
) -> tuple[RunDirectory, LoadedConfig, Tokenizer]:
    """The same with all that is known of the config, and with those of other classes beside it."""
    from seqeff.data import Tokenizer
    from seqeff.runs import RunDirectory

    run = RunDirectory(options.run_dir).require()
    loaded = load(run.operative_config, overrides, run, others=others)
    return run, loaded, Tokenizer.load(run.tokenizer)


def facts(
    options: argparse.Namespace,
    run: RunDirectory,
    loaded: LoadedConfig,
    tokenizer: Tokenizer,
    **seeds: int,
) -> dict[str, Any]:
    """What every result of a run depends on beside the data, for reports.

    The data are told by each result's own `sha256`.

    Args:
      seeds: of what is drawn, by its name.
    """
    from seqeff.training.checkpoints import CheckpointStore

    with CheckpointStore(run.checkpoints) as store:
        latest = store.latest()
    ours = ("run", "run_dir", "name", "parser", "takes_overrides")
    given = {
        name: x
        for name, x in vars(options).items()
        if name not in ours and x is not None and x is not False
    }
    return {
        "run": str(run.path),
        "step": latest if options.checkpoint is None else options.checkpoint,
        "options": json.loads(json.dumps(given, default=str)),
        "tokenizer": tokenizer.fingerprint,
        "seeds": seeds,
        "overrides": loaded.overrides,
        "config": loaded.operative,
    }


def load(
    path: Path,
    overrides: Sequence[str],
    run: RunDirectory | None,
    earlier: Path | None = None,
    others: Sequence[str] = (),
) -> LoadedConfig:
    from seqeff.config import load

    module_paths = [run.modules] if run is not None else []
    return load(path, overrides, others=others, module_paths=module_paths, earlier=earlier)


def shown(path: Path) -> str:
    """A path as short as it can be from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
