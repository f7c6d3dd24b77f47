"""English text that every Python installation carries."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqeff.checks import UserError
from seqeff.data.document import Document
from seqeff.data.files import read_bytes

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_TOPICS = Path("pydoc_data", "topics.py")


@dataclass(frozen=True, kw_only=True)
class BuiltinText:
    """The language reference of `pydoc_data.topics` and the standard library's docstrings.

    A document is one topic, or the docstrings of one module. About 2.2 MB; it differs a little
    between Python versions. Files are parsed with `ast`, never imported.
    """

    def documents(self) -> Iterator[Document]:
        """Topics by name, then modules by path; a docstring that recurs is kept once."""
        yield from map(Document, _texts())

    def fingerprint(self) -> dict[str, Any]:
        """The Python version and a hash of the files that are read."""
        python = platform.python_version()
        return {"kind": "BuiltinText", "format": 1, "python": python, "sha256": _files_hash()}


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files() -> list[Path]:
    root, files = _root(), []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        relative = Path(folder).relative_to(root)
        files.extend(relative / name for name in names if name.endswith(".py"))
    if not files:
        raise UserError(
            f"BuiltinText: this Python's standard library holds no source files in {root}; "
            "use TextFiles with text of your own"
        )
    return [root / path for path in sorted(files, key=lambda path: path.as_posix())]


@functools.cache
def _files_hash() -> str:
    digest = hashlib.sha256()
    for path in _files():
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()


@functools.cache
def _texts() -> tuple[str, ...]:
    topics_path, modules, seen = _root() / _TOPICS, [], set()
    topics: list[str] = []
    for path in _files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(read_bytes(path), filename=str(path))
        if path == topics_path:
            topics = _topics(tree)
            continue
        docstrings = [text for text in _docstrings(tree) if text not in seen]
        seen.update(docstrings)
        if docstrings:
            modules.append("\n\n".join(dict.fromkeys(docstrings)))
    return tuple(dict.fromkeys(topics + modules))


def _topics(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name].strip() for name in sorted(topics)]
    return []


def _docstrings(tree: ast.Module) -> Iterator[str]:
    # docstrings stand in statements, which are a small part of what ast.walk visits
    pending: list[ast.AST] = [tree]
    for node in pending:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                pending.extend(statements)
