"""Reads a gin file with all that it includes and imports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gin import config_parser

from seqeff.checks import ConfigError
from seqeff.config.modules import Classes, import_module, nearest_name, nearest_path
from seqeff.config.overrides import override_statement
from seqeff.config.statements import Binding, Reference, located, map_items, parse, place

ALIASES: dict[str, str] = {}
"""Former names, `Class` or `Class.field`, to today's, with which the configs of old runs load."""


class Reader:
    """The bindings of a file, of what it includes, and of overrides: in order, names resolved."""

    def __init__(self, classes: Classes, path: Path, module_paths: Iterable[str | Path]) -> None:
        self.bindings: list[Binding] = []
        self.files: dict[str, str] = {}
        self.imports: set[str] = set()
        self.modules: dict[str, Path] = {}
        self._classes, self._module_paths = classes, tuple(module_paths)
        self._open: list[str] = []
        self._read(path, _text(path))

    def override(self, override: str) -> None:
        self._override(override, f"--gin.{override}")

    def earlier_overrides(self, path: Path) -> list[tuple[str, str]]:
        """Binds a file's overrides, one a line; returns each with its place."""
        found = []
        for number, line in enumerate(_text(path).split("\n"), start=1):
            if line:
                found.append((line, place(os.path.normpath(path), number)))
                self._override(*found[-1])
        return found

    def _override(self, override: str, where: str) -> None:
        with located(where):
            text = override_statement(override)
        for statement in parse(text, where):
            with located(where):
                self._bind(statement, where, {}, os.curdir)

    def _read(self, path: Path, text: str) -> None:
        source = os.path.normpath(path)
        self.files[source] = text
        self._open.append(source)
        aliases: dict[str, str] = {}
        for statement in parse(text, source):
            where, included = place(source, statement.location.line_num), None
            with located(where):
                if isinstance(statement, config_parser.ImportStatement):
                    self._import(statement.module, path.parent)
                    if statement.alias:
                        aliases[statement.alias] = statement.module
                elif isinstance(statement, config_parser.BindingStatement):
                    self._bind(statement, where, aliases, os.path.dirname(source) or os.curdir)
                elif isinstance(statement, config_parser.IncludeStatement):
                    path_included = path.parent / statement.filename
                    included = (path_included, _text(path_included))
                    if os.path.normpath(path_included) in self._open:
                        raise ConfigError(f"{os.path.normpath(path_included)} includes itself")
            if included is not None and os.path.normpath(included[0]) not in self.files:
                self._read(*included)
        self._open.pop()

    def _import(self, name: str, folder: Path) -> None:
        if name.startswith("__gin__."):
            return  # gin's dynamic registration, which every import has here
        module, sources = import_module(name, (folder, *self._module_paths, Path.cwd()))
        self._classes.add_module(module)
        self.imports.add(name)
        self.modules.update(sources)

    def _bind(
        self,
        statement: config_parser.BindingStatement,
        where: str,
        aliases: Mapping[str, str],
        folder: str,
    ) -> None:
        def full_name(name: str) -> str:
            first, dot, rest = name.partition(".")
            return aliases.get(first, first) + dot + rest

        def resolved(value: Any) -> Any:
            if not isinstance(value, Reference):
                return map_items(resolved, value)
            if not value.evaluated:
                raise ConfigError(f"{value} lacks its parentheses; write {value}()")
            scope, slash, name = value.name.rpartition("/")
            name = full_name(ALIASES.get(name, name))
            return Reference(scope + slash + name, True, self._classes.resolve(name))

        scope, selector, field, value, _ = statement
        written = "/".join(filter(None, (scope, selector))) + f".{field}" * bool(field)
        if field:
            renamed = ALIASES.get(f"{selector}.{field}")
            renamed = renamed or f"{ALIASES.get(selector, selector)}.{field}"
            selector, _, field = ALIASES.get(renamed, renamed).rpartition(".")
            short, selector = selector, self._classes.resolve(full_name(selector))
            fields = self._classes.fields(selector)
            if field not in fields:
                hint = nearest_name(field, fields, f"; its fields are {', '.join(fields)}")
                raise ConfigError(f"{short} has no field {field}{hint}")
            scopes = tuple(filter(None, scope.split("/")))
        else:
            scopes, selector, field = (), "", written
        binding = Binding(scopes, selector, field, resolved(value), written, where, folder)
        for other in self.bindings:
            if other.key == binding.key and other.source in self._open:
                again = "again" if other.source == binding.source else "by an include"
                raise ConfigError(f"{written} is set {again}, after {other.place}; keep one")
        self.bindings.append(binding)


def _text(path: Path) -> str:
    name = os.path.normpath(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no file {name}{nearest_path(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name}: {error}") from None
