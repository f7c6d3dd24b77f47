"""Types for the config fields that name local files.

A relative path in a gin file begins at that file's folder, one on the command line at the working
directory. Configs hold them absolute, so that they mean the same files from wherever they are read.
"""

from __future__ import annotations

import glob
import os
import typing
from collections.abc import Callable
from typing import Annotated, Any

Anchor = Callable[[str, str], str]


def _path(path: str, folder: str) -> str:
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))


def _pattern(pattern: str, folder: str) -> str:
    return _path(pattern, glob.escape(os.path.abspath(folder)))


def _path_or_name(name: str, folder: str) -> str:
    path = _path(name, folder)
    return path if os.path.exists(path) else name


LocalPath = Annotated[str, _path]
"""A file or folder."""

LocalPattern = Annotated[str, _pattern]
"""A file, or files by a glob pattern."""

LocalPathOrName = Annotated[str, _path_or_name]
"""A file or folder if it exists, else the name of something remote."""

_ANCHORS = (_path, _pattern, _path_or_name)


def path_fields(config_class: type) -> dict[str, Anchor]:
    """For each field that holds local paths, the function of (path, folder) that anchors one."""
    try:
        hints = typing.get_type_hints(config_class, include_extras=True)
    except NameError:
        # `check_types` tells this better
        return {}
    anchors = {name: _anchor(hint) for name, hint in hints.items()}
    return {name: anchor for name, anchor in anchors.items() if anchor is not None}


def _anchor(hint: Any) -> Anchor | None:
    for anchor in getattr(hint, "__metadata__", ()):
        if anchor in _ANCHORS:
            return anchor
    return next(filter(None, map(_anchor, typing.get_args(hint))), None)
