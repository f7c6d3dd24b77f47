"""The files of a run directory, which explains itself to every later command."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqeff.checks import UserError

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "datasets",
    "gin-config",
    "wandb",
)


class RunDirectory:
    """Paths and small text files of one run; weights belong to `training.checkpoints`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.gin"
        self.operative_config = self.path / "operative_config.gin"
        self.overrides = self.path / "overrides.txt"
        self.modules = self.path / "modules"
        self.versions = self.path / "versions.json"
        self.tokenizer = self.path / "tokenizer"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.txt"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.operative_config.exists()

    def require(self) -> RunDirectory:
        """This directory, or a UserError if no run was begun in it."""
        if not self.exists():
            raise UserError(
                f"{self.path} is not a run directory: it has no {self.operative_config.name}; "
                "give the directory that `seqeff train` printed"
            )
        return self

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes of this host from training here at the same time.

        Raises:
          UserError: one already does.
        """
        with open(self.path / ".lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training in {self.path}; wait for it, or end it"
                ) from None
            yield

    def begin(
        self, config: str, operative: str, overrides: Sequence[str], modules: Mapping[str, Path]
    ) -> None:
        """Writes what started the run; the operative config last, as the mark of a begun run.

        Raises:
          UserError: the disk is full or read-only.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, config)
            write_atomically(self.overrides, "".join(f"{line}\n" for line in overrides))
            write_atomically(self.versions, json.dumps(versions(), indent=2) + "\n")
            for name, source in modules.items():
                copy = self.modules.joinpath(*name.split(".")).with_suffix(".py")
                copy.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(copy, source.read_text())
            write_atomically(self.operative_config, operative)
        except OSError as error:
            raise UserError(f"cannot write the run directory {self.path}: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, Any]:
    """Versions of Python and the packages that matter, and the commit of this source tree."""
    found = {}
    for package in (*_PACKAGES, "seqeff"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "packages": found,
    }


def _commit() -> str | None:
    source = Path(__file__).resolve().parents[1]
    if not (source / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return None
    return answer.stdout.strip() or None
