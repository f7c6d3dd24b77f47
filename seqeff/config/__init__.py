"""Reads gin configs strictly. The only package that knows gin.

Configs are frozen dataclasses that know nothing of gin; a gin file chooses and fills them:

    include 'models/small.gin'                        # relative to this file; read once
    import my_attention                               # a file beside this one, or installed
    WINDOW = 64                                       # a macro
    TransformerConfig.attention = @MyAttention()
    MyAttention.window = %WINDOW
    Data.sources = (@books/TextFiles(), @news/TextFiles())
    books/TextFiles.path = 'books'                    # only for the one built in scope `books`

gin itself accepts misspelt macros, bindings that nothing reads and values of any type. Here each is
a `ConfigError` of one line that begins with the file and line, or with the override, at fault.

Paths of local files, whose fields have a type of `seqeff.paths`, become absolute: a relative one
begins at the folder of the gin file that gives it, in an override at the working directory.

One kind of unread binding is no mistake: when a later file or an override replaces
`Train.optimizer = @AdamW()` by `@Muon()`, what the earlier files bound for AdamW goes with it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from seqeff.config.builder import Builder, cleared_gin
from seqeff.config.modules import Classes
from seqeff.config.overrides import on_one_line, split_overrides
from seqeff.config.reader import ALIASES, Reader
from seqeff.config.writer import Writer

__all__ = [
    "ALIASES",
    "PACKAGES",
    "LoadedConfig",
    "load",
    "split_overrides",
    "write",
]

PACKAGES = (
    "seqeff.models",
    "seqeff.data",
    "seqeff.training",
    "seqeff.compression",
    "seqeff.sparsity",
    "seqeff.inference",
    "seqeff.interop",
    "seqeff.evaluation",
    "seqeff.analysis",
)


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """A config object and what a run directory keeps of its origin.

    Attributes:
      root: the built config.
      others: those that were built beside it.
      text: the file as given, then the files that it includes, each under a comment with its name.
      operative: every value in use, defaults too, as one gin file that loads to an equal `root`.
      overrides: `NAME=VALUE`, each on one line and with absolute paths: the earlier ones that still
        count, then those given.
      macros: the macro that gives a field its value, by `Class.field`.
      modules: source files of the imported modules that are not installed, by module name, a
        package's being `package.__init__`: `a.b` in `DIRECTORY/a/b.py` is found by
        `load(..., module_paths=[DIRECTORY])`.
    """

    root: Any
    others: tuple[Any, ...]
    text: str
    operative: str
    overrides: tuple[str, ...]
    macros: Mapping[str, str]
    modules: Mapping[str, Path]


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    root: str = "Train",
    others: Sequence[str] = (),
    module_paths: Iterable[str | Path] = (),
    earlier: str | Path | None = None,
) -> LoadedConfig:
    """Reads a gin file and builds the config that it describes. Touches no device.

    Args:
      path: the gin file.
      overrides: `NAME=VALUE` bindings that replace the file's, from `split_overrides`.
      root: the class to build.
      others: classes to build beside it, which the file and the overrides may bind too.
      module_paths: where imported modules are sought after the file's own directory and before the
        current one.
      earlier: a file of overrides, one a line, that come after the gin file, before `overrides`.

    Raises:
      ConfigError: begins with the file and line, or the override, at fault.
    """
    classes = _classes()
    reader = Reader(classes, Path(path), module_paths)
    before = [] if earlier is None else reader.earlier_overrides(Path(earlier))
    for override in overrides:
        reader.override(override)
    with cleared_gin():
        builder = Builder(os.path.normpath(path), classes, reader.bindings)
        config, *beside = builder.build(root, *others)
        operative = gin.operative_config_str()
    imports = "".join(f"import {name}\n" for name in sorted(reader.imports))
    return LoadedConfig(
        root=config,
        others=tuple(beside),
        text="\n".join(f"# {name}\n{content}" for name, content in reader.files.items()),
        operative=f"{imports}\n{operative}" if imports else operative,
        overrides=(
            *(override for override, place in before if place in builder.places_in_use),
            *(builder.absolute.get(f"--gin.{o}") or on_one_line(o) for o in overrides),
        ),
        macros=builder.macros,
        modules=reader.modules,
    )


def write(config: Any) -> str:
    """The gin file of a config: `load` gives an equal one back.

    Args:
      config: of classes that a gin file can name without an import.
    """
    return Writer(_classes()).text(config)


def _classes() -> Classes:
    classes = Classes()
    for package in PACKAGES:
        classes.add_package(package)
    return classes
