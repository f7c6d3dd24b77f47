"""Hands bindings to gin, has it build the root config, and finds what was not used."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gin
from gin import config as gin_config

from seqeff.checks import ConfigError, check_types
from seqeff.config.modules import Classes, nearest_name
from seqeff.config.statements import (
    REQUIRED,
    Binding,
    Macro,
    Reference,
    located,
    map_items,
)
from seqeff.paths import Anchor, path_fields


@contextlib.contextmanager
def cleared_gin() -> Iterator[None]:
    """Empties gin of bindings, and afterwards of them and of the classes registered meanwhile.

    Its registry is global: a class of an earlier config would make a later one's names ambiguous.
    """
    registry, originals = gin_config._REGISTRY, gin_config._INVERSE_REGISTRY
    before = dict(registry.items())
    gin.clear_config()
    try:
        yield
    finally:
        gin.clear_config()
        for selector in dict(registry.items()).keys() - before.keys():
            originals.pop(registry.pop(selector).wrapped)


class _Built(NamedTuple):
    scope: tuple[str, ...]
    selector: str
    config: Any


class Builder:
    """Builds configs from bindings, inside `cleared_gin`.

    Args:
      path: of the gin file, for messages.
      classes: all that may be named.
      bindings: in order; a later one replaces an earlier one of the same key.
    """

    def __init__(self, path: str, classes: Classes, bindings: Sequence[Binding]) -> None:
        self._path, self._classes = path, classes
        self._bindings = [*_default_bindings(classes, path), *bindings]
        self._final = {binding.key: binding for binding in self._bindings}
        self._built: list[_Built] = []
        self._failure: Exception | None = None
        self._passed_over: set[str] = set()
        self.absolute: dict[str, str] = {}
        """`NAME=VALUE` with absolute paths, by place, of the bindings that give relative ones."""
        self._makers = {
            selector: gin.external_configurable(
                self._maker(selector, cls), name=cls.__name__, module=cls.__module__
            )
            for selector, cls in classes.by_name.items()
        }

    def build(self, *roots: str) -> list[Any]:
        """The configs of these classes.

        Raises:
          ConfigError: begins with the place of the binding at fault.
        """
        with located(self._path):
            selectors = [self._classes.resolve(root) for root in roots]
        try:
            self._bind_all()
            configs = [self._makers[selector]() for selector in selectors]
        except RecursionError:
            raise ConfigError(f"{self._path}: a macro or a config contains itself") from None
        except Exception:
            if self._failure is None:
                raise
            raise self._failure from self._failure.__cause__
        self._require_used()
        return configs

    @property
    def places_in_use(self) -> set[str]:
        """Where the bindings are that counted."""
        return {binding.place for binding in self._final.values()} - self._passed_over

    @property
    def macros(self) -> dict[str, str]:
        """For each field, as `Class.field`, that a macro alone gives: the macro's name."""
        return {
            binding.name: binding.value.name
            for binding in self._final.values()
            if binding.selector and isinstance(binding.value, Macro)
        }

    def _bind_all(self) -> None:
        for binding in self._final.values():
            key = ("/".join(binding.scope), binding.selector, binding.field)
            with located(binding.place):
                value = self._gin_value(self._with_absolute_paths(binding))
                gin.bind_parameter(
                    key if binding.selector else (binding.field, "gin.macro", "value"), value
                )

    def _with_absolute_paths(self, binding: Binding) -> Any:
        """The value; where it holds paths, they begin at the folder of the file that gives them."""
        cls = self._classes.by_name.get(binding.selector)
        anchor = path_fields(cls).get(binding.field) if cls is not None else None
        return binding.value if anchor is None else self._anchored(binding, anchor)

    def _anchored(self, binding: Binding, anchor: Anchor) -> Any:
        def anchored(value: Any) -> Any:
            if value and isinstance(value, str):
                return anchor(value, binding.folder)
            if isinstance(value, Macro) and (macro := self._final.get(((), "", value.name))):
                # a macro's path may come from another file than the binding
                return self._anchored(macro, anchor)
            return map_items(anchored, value)

        value = anchored(binding.value)
        if value != binding.value and not binding.uses:
            self.absolute[binding.place] = f"{binding.name}={value!r}"
        return value

    def _gin_value(self, value: Any) -> Any:
        if isinstance(value, Reference):
            scope, slash, _ = value.name.rpartition("/")
            return gin_config.ConfigurableReference(
                scope + slash + self._classes.short(value.selector), True
            )
        if value == Macro("gin.REQUIRED"):
            return REQUIRED
        if isinstance(value, Macro):
            if ((), "", value.name) not in self._final:
                names = [field for _, selector, field in self._final if not selector]
                hint = nearest_name(value.name, names)
                raise ConfigError(f"no macro is called {value.name}{hint}")
            return gin_config.ConfigurableReference(f"{value.name}/gin.macro", True)
        return map_items(self._gin_value, value)

    def _maker(self, selector: str, cls: type) -> Callable[..., Any]:
        """What gin calls for a class; the class itself gin would replace by a subclass."""

        def make(**values: Any) -> Any:
            scope = tuple(gin.current_scope())
            try:
                config = self._checked(scope, selector, cls, values)
            except Exception as error:
                self._failure = error
                raise
            self._built.append(_Built(scope, selector, config))
            return config

        make.__dict__["__signature__"] = inspect.signature(cls)
        return make

    def _checked(self, scope: tuple[str, ...], selector: str, cls: type, values: dict) -> Any:
        empty = inspect.Parameter.empty
        absent = [
            field
            for field, parameter in self._classes.fields(selector).items()
            if any(values.get(field, parameter.default) is nothing for nothing in (REQUIRED, empty))
        ]
        if absent:
            required = [self._effective(scope, selector, field) for field in absent]
            place = next((b.place for b in required if b is not None), None)
            names = ", ".join(f"{cls.__name__}.{field}" for field in absent)
            builder = ""
            if place is None:
                # the mend belongs in the file that was given, whatever it includes
                place = self._user(selector)
                if not place.startswith((f"{self._path}:", "--gin.")) and place != self._path:
                    place, builder = self._path, f" ({cls.__name__} is built by {place})"
            first = names.partition(",")[0]
            raise ConfigError(
                f"{place}: {names} must be set{builder}; add {first} = ... or --gin.{first}=VALUE"
            )
        try:
            config = cls(**values)
            check_types(config)
        except (ConfigError, ValueError, TypeError) as error:
            known = isinstance(error, ConfigError)
            message = self._explained(str(error)) if known else f"{cls.__name__}: {error}"
            raise ConfigError(f"{self._place_of(message, scope, selector)}: {message}") from (
                None if known else error
            )
        return config

    def _explained(self, message: str) -> str:
        """An error of a type, with what the value was likely meant to be."""
        match = re.fullmatch(r"(\w+\.\w+ = '(.*)') is of type str; give (.*)", message)
        if match is None:
            return message
        what, value, expected = match.groups()
        choices = re.findall(r"'([^']*)'", expected)
        if choices:
            return f"{what} is unknown; give {expected}{nearest_name(value, choices)}"
        name = value.removeprefix("@").removesuffix("()")
        return f"{message}; did you mean @{name}()?" if self._classes.matches(name) else message

    def _effective(self, scope: tuple[str, ...], selector: str, field: str) -> Binding | None:
        """The binding that gives a field its value in a scope: that of the innermost scope."""
        keys = ((scope[:depth], selector, field) for depth in range(len(scope), -1, -1))
        return next((self._final[key] for key in keys if key in self._final), None)

    def _place_of(self, message: str, scope: tuple[str, ...], selector: str) -> str:
        """Where the field is bound with which a message begins, else where the class is named."""
        named = re.match(r"(\w+)\.(\w+)", message)
        if named:
            for match in self._classes.matches(named[1]):
                binding = self._effective(scope, match, named[2])
                if binding is not None:
                    return binding.place
        return self._user(selector)

    def _user(self, selector: str) -> str:
        """Where a class is named, which for the root is the file."""
        places = (b.place for b in self._final.values() if selector in b.uses)
        return next(places, self._path)

    def _require_used(self) -> None:
        order = {binding: position for position, binding in enumerate(self._bindings)}
        for binding in self._final.values():
            if not binding.name or self._is_used(binding):
                continue
            replacement = self._replacement(binding.target, set())
            if (
                replacement is None
                or replacement.source == binding.source
                or order[replacement] < order[binding]
            ):
                raise ConfigError(f"{binding.place}: {self._why_unused(binding)}")
            self._passed_over.add(binding.place)

    def _is_used(self, binding: Binding) -> bool:
        if not binding.selector:
            return binding.target in self._macros_used()
        return any(
            built.selector == binding.selector
            and built.scope[: len(binding.scope)] == binding.scope
            for built in self._built
        )

    def _macros_used(self) -> set[str | Macro]:
        found: set[str | Macro] = set()
        reached = [
            self._effective(built.scope, built.selector, field)
            for built in self._built
            for field in self._classes.fields(built.selector)
        ]
        while reached:
            binding = reached.pop()
            for macro in (binding.uses if binding else set()) - found:
                if isinstance(macro, Macro):
                    found.add(macro)
                    reached.append(self._final.get(((), "", macro.name)))
        return found

    def _replacement(self, target: str | Macro, seen: set[str | Macro]) -> Binding | None:
        """The binding that took the place of one that named the target."""
        seen.add(target)
        for binding in self._bindings:
            if target not in binding.uses:
                continue
            final = self._final[binding.key]
            if final is not binding and target not in final.uses:
                return final
            if final.target in seen or self._is_used(final):
                continue
            deeper = self._replacement(final.target, seen)
            if deeper is not None:
                return deeper
        return None

    def _why_unused(self, binding: Binding) -> str:
        if not binding.selector:
            used = {use.name for b in self._bindings for use in b.uses if isinstance(use, Macro)}
            hint = nearest_name(binding.field, used - {binding.field})
            return f"macro {binding.name} is never used{hint}"
        cls = self._classes.by_name[binding.selector]
        scopes = sorted({"/".join(b.scope) for b in self._built if b.selector == binding.selector})
        if scopes:
            hint = nearest_name("/".join(binding.scope), scopes)
            where = ", ".join(scope or "no scope" for scope in scopes)
            return f"{binding.name} is never used: {cls.__name__} is built in {where}{hint}"
        return f"{binding.name} is never used: no {cls.__name__} is built{self._instead(cls)}"

    def _instead(self, cls: type) -> str:
        """The field that holds another value where a config of this class could stand."""
        alike = ""
        for built in self._built:
            owner = type(built.config)
            expected = typing.get_type_hints(owner)
            for field in dataclasses.fields(owner):
                name, value = f"{owner.__name__}.{field.name}", getattr(built.config, field.name)
                is_config = dataclasses.is_dataclass(value)
                held = f" ({name} = {f'@{type(value).__name__}()' if is_config else value})"
                if type(value) is cls:
                    return f" (bind {name} = @{cls.__name__}() to change its default)"
                if _accepts(expected[field.name], cls):
                    return held
                if is_config and type(value).__module__ == cls.__module__:
                    alike = held
        return alike


def _default_bindings(classes: Classes, path: str) -> Iterator[Binding]:
    """Nameless bindings of the defaults that are configs or paths.

    gin builds the configs, so they can be bound; a relative path begins at the working directory.
    """
    names = {cls: selector for selector, cls in classes.by_name.items()}
    for cls, selector in names.items():
        paths = path_fields(cls)
        for field in dataclasses.fields(cls):
            maker: Any = field.default_factory
            kind: Any = type(field.default)
            with contextlib.suppress(TypeError, ConfigError):
                if kind in names and field.default == kind():
                    maker = kind
            if field.init and maker in names:
                value = Reference("", True, names[maker])
                yield Binding((), selector, field.name, value, name="", place=path)
            elif field.init and field.name in paths and field.default is not dataclasses.MISSING:
                yield Binding((), selector, field.name, field.default, name="", place=path)


def _accepts(expected: Any, cls: type) -> bool:
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return any(_accepts(choice, cls) for choice in typing.get_args(expected))
    try:
        if expected is object or not issubclass(cls, expected):
            return False
        # protocols whose methods have the same names differ in their parameters
        methods = inspect.getmembers(expected, inspect.isfunction)
        return not getattr(expected, "_is_protocol", False) or all(
            [*inspect.signature(method).parameters]
            == [*inspect.signature(getattr(cls, name)).parameters]
            for name, method in methods
            if not name.startswith("_")
        )
    except TypeError:
        return False
