"""The settings in a `config.json`, read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from seqeff.checks import UserError
from seqeff.data.files import read_object

Value = TypeVar("Value")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


class Settings:
    """The values of a `config.json`, or of an object in it.

    Args:
      values: by their names.
      place: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self.values, self.place = values, place

    @classmethod
    def load(cls, file: Path) -> Settings:
        """Reads a file.

        Raises:
          UserError: it cannot be read, or is no JSON object.
        """
        return cls(read_object(file), str(file))

    def required(self, name: str, kind: type[Value]) -> Value:
        """A value.

        Raises:
          UserError: it is absent, null or of another type.
        """
        found = self.optional(name, kind, None)
        if found is None:
            raise UserError(f"{self.place} has no {name}; give {_KINDS[kind]}")
        return found

    def size(self, name: str) -> int:
        """A whole number of at least 1, below 2**31.

        Raises:
          UserError: it is absent, null or something else.
        """
        value = self.required(name, int)
        if not 1 <= value < 2**31:
            raise UserError(f"{self.place}: {name} = {value} must be at least 1, below 2**31")
        return value

    def get(self, name: str, default: Value) -> Value:
        """A value, or the default where it is absent or null.

        Raises:
          UserError: it is not of the default's type.
        """
        found = self.optional(name, type(default), default)
        return default if found is None else found

    def optional(self, name: str, kind: type[Value], default: Value | None) -> Value | None:
        """A value, None where it is null, or the default where it is absent.

        Raises:
          UserError: it is of another type.
        """
        value = self.values.get(name, default)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{self.place}: {name} = {value!r} is not {_KINDS[kind]}")
        return value

    def only(self, **expected: Any) -> None:
        """Refuses values other than those expected; one that is absent or null is as expected.

        Raises:
          UserError: names the first such value.
        """
        for name, wanted in expected.items():
            value = self.values.get(name)
            if value is not None and value != wanted:
                raise UserError(
                    f"{self.place}: {name} = {value!r} is not supported; only {wanted!r} is"
                )

    def choice(self, name: str, choices: Mapping[str, Value], default: str) -> Value:
        """What a value stands for.

        Raises:
          UserError: it is not one of the choices.
        """
        value = self.get(name, default)
        if value not in choices:
            raise UserError(
                f"{self.place}: {name} = {value!r} is not supported; supported are "
                f"{', '.join(choices)}"
            )
        return choices[value]

    def part(self, name: str) -> Settings | None:
        """An object among the values; None where it is absent, null or empty.

        Raises:
          UserError: it is no object.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{self.place}: {name} = {value!r} is not an object")
        return Settings(value, f"{self.place}: {name}") if value else None
