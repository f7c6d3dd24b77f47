"""Input files: found by name or pattern, described for cache keys, read with clear errors."""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from seqeff.checks import UserError

_POINTER = b"version https://git-lfs.github.com/spec/"


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint `"; did you mean 'x'?"` with the choice closest to the name, or an empty string."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def existing_file(path: str | Path, field: str) -> Path:
    """The path of a file that exists.

    Raises:
      UserError: names the config field and the nearest file of that folder.
    """
    found = Path(path).expanduser()
    if found.exists():
        return found
    siblings = os.listdir(found.parent) if found.parent.is_dir() else []
    raise UserError(f"{field} = {str(path)!r}: no such file{nearest(found.name, siblings)}")


def find_files(patterns: Sequence[str], field: str) -> list[Path]:
    """Files named by paths or glob patterns (`**` for any depth), sorted, each once.

    Raises:
      UserError: a pattern matches nothing, a path does not exist or is a directory.
    """
    files: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if not glob.has_magic(expanded):
            path = existing_file(expanded, field)
            if path.is_dir():
                raise UserError(
                    f"{field} = {pattern!r} is a directory; give a pattern such as "
                    f"{os.path.join(pattern, '**', '*')!r}"
                )
            files.add(path)
            continue
        matches = [Path(match) for match in glob.glob(expanded, recursive=True)]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            looked = "" if os.path.isabs(expanded) else f" (looked in {os.getcwd()})"
            raise UserError(f"{field} = {pattern!r} matches no file{looked}")
        files.update(matches)
    return sorted(files, key=lambda path: path.as_posix())


def describe_files(files: Sequence[Path]) -> list[list[str | int]]:
    """Absolute path, size in bytes and modification time (ns) of each file, for a cache key."""
    described: list[list[str | int]] = []
    for path in files:
        status = path.stat()
        described.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    return described


def read_bytes(path: Path) -> bytes:
    """The whole file; a failure to read, or a pointer of Git LFS, is a `UserError`."""
    try:
        found = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    require_content(path, found)
    return found


def require_content(path: Path, beginning: bytes) -> None:
    """Refuses what Git LFS leaves in a file's place until it is fetched."""
    if beginning.startswith(_POINTER):
        raise UserError(
            f"{path} is a pointer of Git LFS, not the file: fetch it there with git lfs pull"
        )


def read_object(file: Path) -> dict[str, Any]:
    """The object of a JSON file; a `UserError` where it holds none, or cannot be read."""
    try:
        values = json.loads(decode_utf8(read_bytes(file), str(file)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object; repair it, or take it away")
    return values


def decode_utf8(data: bytes, place: str) -> str:
    """UTF-8 text, with or without a byte-order mark; `place` is named in the `UserError`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            "convert it, for example with iconv"
        ) from error
