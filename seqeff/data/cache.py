"""Directories that are complete or absent, whatever moment the process dies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from seqeff.checks import UserError, writing


def cache_root(configured: str | None) -> Path:
    """The configured folder, else `$SEQEFF_CACHE`, else `~/.cache/seqeff`."""
    return Path(configured or os.environ.get("SEQEFF_CACHE") or "~/.cache/seqeff").expanduser()


def cache_key(description: Any) -> str:
    """32 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(description)).hexdigest()[:32]


def canonical_json(value: Any) -> bytes:
    """JSON that equal values share byte for byte."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns what can fail in the cache folder into a `UserError`."""
    elsewhere = "folder with Data.cache or the environment variable SEQEFF_CACHE"
    try:
        with writing(f"to {path}", f"or choose another {elsewhere}"):
            yield
    except NotImplementedError as error:
        raise UserError(
            f"cannot lock files in {path}: {error}; choose a local {elsewhere}"
        ) from error


def build_once(final: Path, build: Callable[[Path], None]) -> None:
    """Makes the directory `final`, unless it exists, by filling an empty one that is then renamed.

    Concurrent callers wait for the first. What a killed process left behind is removed by the next
    build in the same folder.

    Raises:
      UserError: the folder cannot be written.
    """
    if final.is_dir():
        return
    root = final.parent
    lock = _lock(root, final.name)
    with writing_to(root):
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if final.is_dir():
            return
        _remove_abandoned(root, final.name)
        partial = root / f".{final.name}.{uuid.uuid4().hex}.partial"
        try:
            with writing_to(root):
                partial.mkdir()
            build(partial)
            with writing_to(root):
                for file in partial.rglob("*"):
                    _synchronize(file)
                _synchronize(partial)
                os.rename(partial, final)
                _synchronize(root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        lock.release()


def _lock(root: Path, name: str) -> filelock.BaseFileLock:
    return filelock.FileLock(root / f".{name}.lock")


def _remove_abandoned(root: Path, held: str) -> None:
    for partial in root.glob(".*.partial"):
        name = partial.name.split(".")[1]
        # a lock is free exactly when its builder has ended
        with contextlib.suppress(filelock.Timeout), contextlib.ExitStack() as stack:
            if name != held:
                stack.enter_context(_lock(root, name).acquire(timeout=0))
            shutil.rmtree(partial, ignore_errors=True)


def _synchronize(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
