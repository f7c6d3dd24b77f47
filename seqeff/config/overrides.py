"""Overrides on a command line: `--gin.NAME=VALUE`, also as wandb's sweep agents write them."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from seqeff.checks import ConfigError

WORDS = {"true": "True", "false": "False", "null": "None", "none": "None"}


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--gin.NAME=VALUE` and `--gin.NAME VALUE` out of a command line.

    Returns:
      The overrides as `NAME=VALUE`, and the other arguments in order. Nothing is taken after `--`.

    Raises:
      ConfigError: an override without a value.
    """
    overrides, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            return overrides, [*rest, argument, *remaining]
        if not argument.startswith("--gin."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--gin.")
        if "=" not in override:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ConfigError(f"{argument} has no value; write {argument}=VALUE")
            override = f"{override}={value}"
        overrides.append(override)
    return overrides, rest


def override_statement(override: str) -> str:
    """The gin statement that `NAME=VALUE` means.

    Literals, references `@Class()` and macros `%NAME` stay. `true`, `false`, `null` and `none` in
    any case become Python's, and other bare words strings, in lists, tuples and dictionaries too.

    Raises:
      ConfigError: not of the form `NAME=VALUE`.
    """
    name, _, value = override.partition("=")
    if not re.fullmatch(r"[\w./]+", name) or not value.strip():
        raise ConfigError("write --gin.NAME=VALUE; the empty string is \"--gin.NAME=''\"")
    return f"{name} = {_repaired(value.strip())}"


def on_one_line(override: str) -> str:
    """The override, with line ends in its value escaped."""
    if not re.search(r"[\r\n]", override):
        return override
    return override_statement(override).replace(" = ", "=", 1)


def _repaired(value: str) -> str:
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    if value.startswith(("@", "%")) or _is_literal(value):
        return value
    if value[0] + value[-1] in ("[]", "()"):
        items = [_repaired(item.strip()) for item in _split(value[1:-1]) if item.strip()]
        return f"({''.join(item + ', ' for item in items)})"
    if value[0] + value[-1] == "{}":
        pairs = [_split(item, ":") for item in _split(value[1:-1]) if item.strip()]
        if all(len(pair) == 2 for pair in pairs):
            items = [f"{_repaired(key.strip())}: {_repaired(of.strip())}" for key, of in pairs]
            return f"{{{', '.join(items)}}}"
    return repr(value)


def _is_literal(value: str) -> bool:
    try:
        return ast.literal_eval(value) is not ... and "\n" not in value
    except (ValueError, SyntaxError):
        return False


def _split(items: str, separator: str = ",") -> list[str]:
    """Splits at the separators outside quotes and brackets."""
    parts, depth = [""], 0
    for piece in re.findall(r"""'[^']*'|"[^"]*"|.""", items):
        depth += (piece in "([{") - (piece in ")]}")
        if piece == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts
