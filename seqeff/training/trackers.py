"""Where metrics go besides the run directory."""

from __future__ import annotations

import dataclasses
import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable
from urllib.parse import urlparse

import jax

from seqeff.checks import UserError, check_types, require, writing
from seqeff.runs import write_atomically

_ID_FILE = "wandb_id"
Mode = Literal["online", "offline", "disabled"]


class Tracker(Protocol):
    """A run's metrics, sent elsewhere while it trains."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


@runtime_checkable
class TrackerConfig(Protocol):
    """Config of a tracker."""

    def check(self) -> None:
        """Raises a `UserError` where `start` would, as far as can be told before a run begins."""
        ...

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> Tracker:
        """Begins, or resumes, tracking a run.

        Args:
          run_directory: exists; keeps what the tracker needs to resume.
          config: the run's bindings, shown beside its metrics.
        """
        ...


class NoTracker:
    """Sends nothing."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases.

    A run directory keeps the id of its run, so a resumed run continues under it. Under
    `wandb agent` the run, the project and the entity are the agent's. Nothing ever prompts.

    Attributes:
      name: shown for the run; None: the run directory's.
      mode: None: online with an API key, else offline (`wandb sync` uploads it later). The
        environment variable WANDB_MODE goes before it.
    """

    project: str = "seqeff"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Mode | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(bool(self.project), "Wandb.project is empty; give a name")

    def check(self) -> None:
        """See `TrackerConfig`.

        Raises:
          UserError: wandb is not installed, its mode is unknown, or it is asked to go online
            without a key.
        """
        # asking for the process starts the devices
        if jax.distributed.is_initialized() and jax.process_index() != 0:
            return
        self._mode()
        _import_wandb()

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> Tracker:
        """See `TrackerConfig`. Processes other than 0 send nothing.

        Raises:
          UserError: wandb is not installed, or refuses, or is asked to go online without a key; or
            the run directory cannot be written.
        """
        if jax.process_index() != 0:
            return NoTracker()
        wandb, mode = _import_wandb(), self._mode()
        swept = "WANDB_SWEEP_ID" in os.environ
        with writing(f"wandb's files to {run_directory}"):
            try:
                run = wandb.init(
                    dir=run_directory,
                    id=None if swept else _run_id(run_directory),
                    project=None if swept else self.project,
                    entity=None if swept else self.entity,
                    name=self.name or run_directory.name,
                    group=self.group,
                    tags=self.tags,
                    config=dict(config),
                    mode=mode,
                    resume="allow",
                    # capturing the terminal would garble the progress bar
                    settings=wandb.Settings(console="off"),
                )
            except wandb.Error as error:
                raise UserError(f"wandb: {error}; WANDB_MODE=offline trains without it") from error
            if mode != "disabled":
                write_atomically(run_directory / _ID_FILE, f"{run.id}\n")
        return _WandbRun(run)

    def _mode(self) -> Mode:
        given = os.environ.get("WANDB_MODE") or self.mode
        if given is None:
            return "online" if _has_key() else "offline"
        if given not in get_args(Mode):
            raise UserError(
                f"WANDB_MODE = {given} must be one of {', '.join(get_args(Mode))}, or unset"
            )
        if given == "online" and not _has_key():
            raise UserError(
                "wandb is asked to go online, but there is no API key; run `wandb login`, set "
                "WANDB_API_KEY, or set WANDB_MODE=offline"
            )
        return cast(Mode, given)


class _WandbRun:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "Train.tracker = @Wandb() needs wandb; pip install wandb, or set Train.tracker = None"
        ) from error
    return wandb


def _run_id(run_directory: Path) -> str:
    """The id that the environment gives, else the run directory's, else a new one."""
    stored = run_directory / _ID_FILE
    if identifier := os.environ.get("WANDB_RUN_ID"):
        return identifier
    return stored.read_text().strip() if stored.exists() else secrets.token_hex(4)


def _has_key() -> bool:
    """Whether wandb would find an API key without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = os.environ.get("NETRC", Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
