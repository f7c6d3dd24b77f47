"""The statements of a gin text, before any class is looked up."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from gin import config_parser

from seqeff.checks import ConfigError
from seqeff.config.overrides import WORDS


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/Class()`; its selector is the class's full name."""

    name: str
    evaluated: bool
    selector: str = ""

    def __repr__(self) -> str:
        return f"@{self.name}{'()' * self.evaluated}"


@dataclasses.dataclass(frozen=True)
class Macro:
    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


class Required:
    """Stands for `%gin.REQUIRED` as a bound value: gin copies values, and this stays itself."""

    def __deepcopy__(self, memo: Any) -> Required:
        return self


REQUIRED = Required()


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """One statement `scope/Class.field = value`; a macro has its name as `field` and no class.

    Relative paths begin in `folder`: the file's; of a default or an override, where one is.
    """

    scope: tuple[str, ...]
    selector: str
    field: str
    value: Any
    name: str
    place: str
    folder: str = os.curdir

    @property
    def key(self) -> tuple[tuple[str, ...], str, str]:
        return self.scope, self.selector, self.field

    @property
    def source(self) -> str:
        """The file, a run's overrides too, or the command line."""
        return "--gin." if self.place.startswith("--gin.") else self.place.rpartition(":")[0]

    @property
    def target(self) -> str | Macro:
        """What another binding's value must name for this one to count."""
        return self.selector or Macro(self.field)

    @property
    def uses(self) -> set[str | Macro]:
        """The classes and macros that the value names."""
        leaves = (leaf for leaf in _leaves(self.value) if isinstance(leaf, (Reference, Macro)))
        return {leaf.selector if isinstance(leaf, Reference) else leaf for leaf in leaves}


def map_items(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to a container's items; lists become tuples, as configs are frozen."""
    if isinstance(value, (list, tuple)):
        return tuple(map(function, value))
    if isinstance(value, dict):
        return {function(key): function(item) for key, item in value.items()}
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    if not isinstance(value, tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)


@contextlib.contextmanager
def located(place: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error.__cause__


def parse(text: str, source: str) -> Iterator[Any]:
    """The gin statements of a text, with its references and macros left as they are written."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        yield from parser
    except SyntaxError as error:
        raise ConfigError(f"{place(source, error.lineno)}: {_explanation(error)}") from None
    except tokenize.TokenError as error:
        line = parser.current_token.start[0] if parser else error.args[1][0]
        raise ConfigError(f"{place(source, line)}: a bracket or a quote is not closed") from None


def place(source: str, line: int | None) -> str:
    return source if source.startswith("--gin.") else f"{source}:{line}"


def _explanation(error: SyntaxError) -> str:
    token = re.search(r"Failed to parse token '(.*)'", error.msg, re.DOTALL)
    word = token[1] if token else ""
    if word.lower() in WORDS:
        return f"{word} is not a gin value; write {WORDS[word.lower()]}"
    if word.isidentifier():
        return f"{word} is not a gin value; write '{word}', @{word}() or %{word}"
    reason = error.msg.splitlines()[0].rstrip(".")
    return f"cannot read `{(error.text or '').strip()}`: {reason[:1].lower()}{reason[1:]}"
