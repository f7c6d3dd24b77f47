"""Errors meant for people, and the type checks that every config class runs on itself."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import errno
import math
import os
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class UserError(Exception):
    """A mistake in a config, an input or a file: one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class ConfigError(UserError):
    """A config value that cannot be: names the field, its value and the fix."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@contextlib.contextmanager
def writing(
    what: str, remedy: str = "make it writable, or choose another --run-dir"
) -> Iterator[None]:
    """Turns a full disk, missing permission or read-only file system into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # native libraries report the system's error only in the text of their own
        reasons = [text for text in map(os.strerror, _DISK_ERRORS) if text in str(error)]
        if isinstance(error, OSError):
            reasons = [error.strerror or str(error)]
        if not reasons:
            raise
        raise UserError(f"cannot write {what}: {reasons[0]}; free space there, {remedy}") from error


def check_types(config: Any) -> None:
    """Checks every field of a dataclass instance against its annotation; an int passes for a float.

    Raises:
      ConfigError: names the class, the field, its value and the type that it should have, or a
        float that is infinite or not a number; or the name in an annotation that its module lacks.
    """
    try:
        hints = typing.get_type_hints(type(config))
    except NameError as error:
        raise ConfigError(
            f"{type(config).__name__}: {error}, but an annotation uses it; import it at run time"
        ) from error
    for field in dataclasses.fields(config):
        value, expected = getattr(config, field.name), hints[field.name]
        if not _matches(value, expected):
            raise ConfigError(
                f"{type(config).__name__}.{field.name} = {value!r} is of type "
                f"{type(value).__name__}; give {_describe(expected)}"
            )
        require(
            _is_finite(value),
            f"{type(config).__name__}.{field.name} = {value!r} is not finite; give a number",
        )


def flatten(config: Any) -> dict[str, Any]:
    """All values of a tree of dataclasses, by dotted path; a dataclass's own is its class name."""
    flat: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if path:
                flat[path] = type(value).__name__
            names = [field.name for field in dataclasses.fields(value)]
            items = [(name, getattr(value, name)) for name in names]
        elif isinstance(value, collections.abc.Mapping):
            items = [(str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)) and any(map(dataclasses.is_dataclass, value)):
            items = [(str(index), item) for index, item in enumerate(value)]
        else:
            flat[path] = value
            return
        for name, item in items:
            visit(f"{path}.{name}" if path else name, item)

    visit("", config)
    return flat


def _is_finite(value: Any) -> bool:
    """Whether no float in a field's value is infinite or not a number."""
    if isinstance(value, collections.abc.Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _matches(value: Any, expected: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        # gin writes sequences as lists as readily as tuples
        if not isinstance(value, (tuple, list)):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_matches, value, arguments))
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, (tuple, list)) and all(
            _matches(item, arguments[0]) for item in value
        )
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping) and all(
            _matches(key, arguments[0]) and _matches(item, arguments[1])
            for key, item in value.items()
        )
    if origin is not None:
        return isinstance(value, origin)
    if expected is None:
        return value is None
    if isinstance(value, type):  # a class has its instances' methods, so it passes for a protocol
        return expected in (type, object)
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _describe(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is None or expected is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else _describe(a) for a in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(expected, "__name__", str(expected))
