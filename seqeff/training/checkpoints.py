"""Checkpoints of a run: written by Orbax, complete or absent, and checked before they are used.

A checkpoint of step 1200 is the directory `1200/`: Orbax's arrays under `arrays/`, and
`manifest.json` with the caller's metadata, the shape and dtype of every array, and the length and
CRC-32 of every file. It is built as `.saving-1200/` and renamed once all of it is on the disk, so
its name alone says that it is whole, whatever moment the process dies. The directory must be on a
POSIX file system that all processes share.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
from orbax.checkpoint import v1 as ocp

from seqeff.checks import UserError, check_types, require, writing

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_SAVING, _DELETING = ".saving-", ".deleting-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When a run's state is saved, and which checkpoints stay.

    Attributes:
      every: steps from one checkpoint to the next; the last step is always saved.
      keep: how many of the latest checkpoints stay.
      keep_every: checkpoints of steps that this divides are never deleted.
      asynchronous: training goes on while files are written; arrays are copied to the host first.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"Checkpoints.{name} = {value} must be at least 1")

    def due(self, step: int, steps: int) -> bool:
        """Whether a run of `steps` steps saves after its step number `step`, counted from 1."""
        return step % self.every == 0 or step == steps

    def superseded(self, steps: list[int]) -> list[int]:
        """Those of the ascending `steps` that need not stay."""
        old = steps[: -self.keep]
        return [step for step in old if self.keep_every is None or step % self.keep_every != 0]


class CheckpointStore:
    """The checkpoints in one directory; a context manager, or `close()` it.

    Without a config it only reads, and leaves alone what another process is writing. With one it
    creates the directory and removes what an interrupted run left half-written.
    """

    def __init__(self, directory: str | Path, config: Checkpoints | None = None) -> None:
        self.directory = Path(directory).absolute()
        self._config = config
        self._main = jax.process_index() == 0
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        if config is not None and self._main:
            with writing(f"checkpoint {self.directory}"):
                self.directory.mkdir(parents=True, exist_ok=True)
                for prefix in (_SAVING, _DELETING):
                    for unfinished in self.directory.glob(prefix + "*"):
                        shutil.rmtree(unfinished)
        self._saved = set(self.steps())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:
                raise

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The last step with a complete checkpoint."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Saves a state; returns once its arrays may be donated, or when all is on the disk.

        A checkpoint of this step that exists already stays as it is. A save in progress is waited
        for first. With many processes, all of them call this.

        Args:
          step: names the checkpoint.
          state: a pytree of jax arrays.
          metadata: a JSON object, given back by `restore`.

        Raises:
          UserError: this save, or the one before, could not be written.
        """
        if self._config is None:
            raise ValueError("this CheckpointStore only reads: it was made without a config")
        self.wait()
        if step in self._saved:
            return
        arrays = _named_leaves(state)
        manifest = {"step": step, "metadata": metadata, "arrays": _describe(arrays)}
        json.dumps(manifest)
        target = self.directory / f"{_SAVING}{step}"
        with writing(f"checkpoint {target}"):
            if self._main:
                target.mkdir()
            with _orbax():
                response = ocp.save_async(str(target / _ARRAYS), arrays)
        self._saved.add(step)
        self._pending = self._thread.submit(self._finish, target, response, manifest)
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the save in progress is complete.

        Raises:
          UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the save in progress, and ends."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(
        self, step: int | None, abstract_state: Any, *, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """The state and the metadata of a checkpoint.

        Args:
          step: which checkpoint; None: the latest.
          abstract_state: a pytree of `jax.ShapeDtypeStruct` with the shardings that the arrays
            shall have, on any mesh; one without a sharding goes to the first device.
          partial: the checkpoint may hold arrays that `abstract_state` lacks; they are not read.

        Raises:
          UserError: there is no such checkpoint, it is damaged, or its arrays differ.
        """
        self.wait()
        steps = self.steps()
        if step is None and not steps:
            raise UserError(f"{self.directory} holds no complete checkpoint")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(
                f"{self.directory} has no checkpoint of step {step}; it has {_listed(steps)}"
            )
        path = self.directory / str(step)
        try:
            manifest = _read_manifest(path)
            _check_files(path, manifest["files"])
        except (_Damage, OSError) as damage:
            raise UserError(
                f"checkpoint {path} is damaged ({damage}); {_advice(step, steps)}"
            ) from None
        wanted = _named_leaves(abstract_state)
        _check_arrays(path, manifest["arrays"], _describe(wanted), partial)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)
            for name, leaf in wanted.items()
        }
        with _orbax(partial):
            arrays = ocp.load(str(path / _ARRAYS), wanted)
        structure = jax.tree.structure(abstract_state)
        return structure.unflatten(arrays[name] for name in wanted), manifest["metadata"]

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints past a step, when a run goes on from an earlier one."""
        self.wait()
        for later in self.steps():
            if later > step:
                self._saved.discard(later)
                self._delete(later)

    def _finish(self, target: Path, response: Any, manifest: dict[str, Any]) -> None:
        """Waits for Orbax, then makes the checkpoint complete; in the background."""
        assert self._config is not None
        try:
            with writing(f"checkpoint {target}"):
                response.result()
                if not self._main:
                    return
                manifest["files"] = _checksums(target)
                _write_manifest(target, manifest)
                target.rename(self.directory / str(manifest["step"]))
                _synchronise(self.directory)
        except BaseException:
            self._saved.discard(manifest["step"])
            if self._main:
                shutil.rmtree(target, ignore_errors=True)
            raise
        for step in self._config.superseded(self.steps()):
            self._delete(step)

    def _delete(self, step: int) -> None:
        if not self._main:
            return
        # renamed first: a checkpoint that is half deleted must not look complete
        doomed = self.directory / f"{_DELETING}{step}"
        with writing(f"checkpoint {doomed}"):
            (self.directory / str(step)).rename(doomed)
            shutil.rmtree(doomed)


class _Damage(Exception):
    """What is wrong with a checkpoint's files."""


def _orbax(partial: bool = False) -> ocp.Context:
    # Orbax also logs, with a traceback a thread, every error that it raises
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    context = ocp.Context()
    # trained weights are noise to a compressor: it costs time and saves 8%
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False
    context.pytree.loading.partial_load = partial
    return context


def _named_leaves(state: Any) -> dict[str, Any]:
    """Leaves by their dotted path, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same dotted path")
    return named


def _describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{array.dtype}[{','.join(map(str, array.shape))}]" for name, array in arrays.items()
    }


def _check_arrays(
    path: Path, saved: Mapping[str, str], wanted: Mapping[str, str], partial: bool
) -> None:
    differing = [
        f"{name} ({saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} here)"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name) and not (partial and name not in wanted)
    ]
    if differing:
        shown = "; ".join(differing[:5]) + (" and others" if len(differing) > 5 else "")
        raise UserError(
            f"checkpoint {path} differs from this run in {len(differing)} arrays: {shown}; "
            "use the config that it was saved with"
        )


def _checksums(target: Path) -> dict[str, list[int]]:
    files = sorted(path for path in target.rglob("*") if path.is_file())
    return {str(file.relative_to(target)): [file.stat().st_size, _crc32(file)] for file in files}


def _check_files(path: Path, files: Mapping[str, list[int]]) -> None:
    # the processes share the reading; one that finds damage ends the job for all of them
    for name in sorted(files)[jax.process_index() :: jax.process_count()]:
        length, checksum = files[name]
        file = path / name
        if not file.is_file():
            raise _Damage(f"{name} is missing")
        if file.stat().st_size != length:
            raise _Damage(f"{name} has {file.stat().st_size} bytes instead of {length}")
        if _crc32(file) != checksum:
            raise _Damage(f"{name} has changed since it was written")


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _write_manifest(target: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest)
    with (target / _MANIFEST).open("w") as stream:
        stream.write(f"{text}\n{zlib.crc32(text.encode())}\n")
        stream.flush()
        os.fsync(stream.fileno())
    _synchronise(target)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        text, checksum = (path / _MANIFEST).read_text().splitlines()
        if zlib.crc32(text.encode()) != int(checksum):
            raise ValueError
        return json.loads(text)
    except (OSError, ValueError):
        raise _Damage(f"{_MANIFEST} is missing or has changed since it was written") from None


def _synchronise(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _advice(step: int, steps: list[int]) -> str:
    earlier = [other for other in steps if other < step]
    if not earlier:
        return "no earlier one is kept, so start again in a new run directory"
    return f"to go on from the one before it, add --checkpoint {earlier[-1]}"
