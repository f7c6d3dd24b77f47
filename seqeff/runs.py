"""The files of a run directory, which explains itself to every later command."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from seqeff.checks import UserError, writing

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
    "lm_eval",
    "jax-cuda13-plugin",
    "triton",
)


class Origin(NamedTuple):
    """What a run is started with.

    Attributes:
      config: the gin file as given.
      operative: every value in use, as one gin file.
      overrides: `NAME=VALUE`, each on one line and with absolute paths; whoever goes on with the
        run begins with them.
      modules: source files that the config imports from outside packages, by module name.
    """

    config: str = ""
    operative: str = ""
    overrides: Sequence[str] = ()
    modules: Mapping[str, Path] = MappingProxyType({})


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
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self._lock = self.path / ".lock"

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Turns a directory that cannot be written into a `UserError`."""
        return writing(f"the run directory {self.path}")

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.operative_config.exists()

    def require(self) -> RunDirectory:
        """This directory, or a UserError if no run was begun in it."""
        if not self.exists():
            lacks = f"has no {self.operative_config.name}" if self.path.exists() else "is not there"
            raise UserError(
                f"{self.path} is not a run directory: it {lacks}; give the directory that "
                "`seqeff train` or `seqeff import` printed"
            )
        return self

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training here meanwhile; makes the directory if need be.

        A directory that was absent or empty is removed again if no run is begun in it. Of a job's
        many processes, only the first does anything.

        Raises:
          UserError: another process trains here, the directory holds something else, or it cannot
            be written.
        """
        # asking for the process starts the devices, which a bad config must not reach
        if jax.distributed.is_initialized() and jax.process_index() != 0:
            yield
            return
        with contextlib.ExitStack() as stack:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file; choose another directory")
            with self.writing():
                self.path.mkdir(parents=True, exist_ok=True)
                empty = not any(self.path.iterdir())
                if not (empty or self.exists() or self._lock.exists()):
                    raise UserError(
                        f"{self.path} is neither empty nor a run directory; choose another one"
                    )
                file = stack.enter_context(open(self._lock, "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"another process is training in {self.path}; wait for it, or end it"
                    ) from None
            try:
                yield
            finally:
                if empty and not self.exists():
                    shutil.rmtree(self.path, ignore_errors=True)

    def data_fingerprint(self) -> dict[str, Any]:
        """What identifies the run's tokenizer and documents.

        Raises:
          UserError: it is missing or damaged.
        """
        try:
            return json.loads(self.data.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.data}: {error}; the run is damaged") from error

    def check_modules(self, modules: Mapping[str, Path]) -> None:
        """Refuses modules whose code is no longer what the run has kept of them.

        Raises:
          UserError: names the first such file, its copy, and how to go on.
        """
        for name, source in modules.items():
            copy = self._copy(name)
            if copy.exists() and copy.read_text("utf-8") != source.read_text("utf-8"):
                raise UserError(
                    f"{source} is not the code that this run began with, {copy}; to go on with the "
                    f"new code, put it there: {shlex.join(['cp', str(source), str(copy)])}; or "
                    "choose another --run-dir"
                )

    def begin(self, origin: Origin) -> None:
        """Writes what the run is started with; the operative config last, as the mark of a run.

        Raises:
          UserError: the disk is full or read-only.
        """
        with self.writing():
            write_atomically(self.config, origin.config)
            write_atomically(self.overrides, "".join(f"{line}\n" for line in origin.overrides))
            write_atomically(self.versions, json.dumps(versions(), indent=2) + "\n")
            for name, source in origin.modules.items():
                copy = self._copy(name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(copy, source.read_text("utf-8"))
            write_atomically(self.operative_config, origin.operative)

    def add_sample(self, step: int, text: str) -> None:
        """Keeps the text that was sampled after a step, in place of an earlier one of that step.

        Raises:
          UserError: the disk is full or read-only.
        """
        with self.writing():
            self.samples.mkdir(exist_ok=True)
            write_atomically(self.samples / f"{step}.txt", text + "\n")

    def _copy(self, module: str) -> Path:
        return self.modules.joinpath(*module.split(".")).with_suffix(".py")


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
        "platform": f"{platform.system()} {platform.machine()}",
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
