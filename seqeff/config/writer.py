"""Writes a config object as a gin file."""

from __future__ import annotations

import collections.abc
import dataclasses
from collections.abc import Iterable
from typing import Any

from seqeff.checks import flatten
from seqeff.config.modules import Classes


class Writer:
    """Bindings, a class at a time.

    Every field is bound, so that objects of one class can differ: the first one's bindings have no
    scope, and each further one has a scope that is named after the field that first holds it.
    """

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._written: dict[str, list[tuple[Any, str]]] = {}
        self._blocks: list[str] = []

    def text(self, root: Any) -> str:
        """The file that builds the root."""
        self._reference(root, "")
        return "\n\n".join(reversed(self._blocks)) + "\n"

    def _reference(self, config: Any, path: str) -> str:
        """What names an object; its bindings are added if it is a new one."""
        cls = type(config)
        name = self._classes.short(f"{cls.__module__}.{cls.__name__}")
        known = self._written.setdefault(name, [])
        for other, scoped in known:
            # 1 and True are equal, their text is not
            if repr(flatten(other)) == repr(flatten(config)):
                return f"@{scoped}()"
        scoped = f"{path}/{name}" if known else name
        known.append((config, scoped))
        lines = []
        for field in dataclasses.fields(config):
            inner = f"{path}_{field.name}" if path else field.name
            value = self._value(getattr(config, field.name), inner)
            lines.append(f"{scoped}.{field.name} = {value}")
        if lines:
            self._blocks.append("\n".join(lines))
        return f"@{scoped}()"

    def _value(self, value: Any, path: str) -> str:
        if dataclasses.is_dataclass(value):
            return self._reference(value, path)
        if isinstance(value, collections.abc.Mapping):
            items = zip(value, self._values(value.values(), path), strict=True)
            return f"{{{', '.join(f'{key!r}: {item}' for key, item in items)}}}"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self._values(value, path))}{',' * (len(value) == 1)})"
        return repr(value)

    def _values(self, values: Iterable[Any], path: str) -> list[str]:
        return [self._value(value, f"{path}_{index}") for index, value in enumerate(values)]
