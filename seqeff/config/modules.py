"""Finds what a config names: modules, installed or beside it, and their frozen dataclasses."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from seqeff.checks import ConfigError


def nearest_name(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """`; did you mean NAME?` for the candidate most like the name, else `otherwise`."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else otherwise


def nearest_path(path: str | Path) -> str:
    """The same for a missing file, its first missing part compared with what its folder has."""
    parts = Path(os.path.normpath(path)).parts
    for depth in range(len(parts)):
        folder = Path(*parts[:depth])
        if not Path(*parts[: depth + 1]).exists():
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            by_name = {entry.name: entry for entry in entries}
            close = difflib.get_close_matches(parts[depth], by_name, n=1)
            return f"; did you mean {by_name[close[0]]}?" if close else ""
    return ""


class Classes:
    """The frozen dataclasses that a config may name, by full or by any sufficient partial name."""

    def __init__(self) -> None:
        self.by_name: dict[str, type] = {}

    def add_package(self, name: str) -> None:
        """Adds the public classes of a package's public modules, if there is such a package."""
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if _is_part(error.name, name):
                return
            raise
        self.add_module(package)
        for found in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{name}."):
            if not found.name.rpartition(".")[2].startswith("_"):
                self.add_module(importlib.import_module(found.name))

    def add_module(self, module: ModuleType) -> None:
        """Adds the public frozen dataclasses that the module, or its package, defines."""
        top = module.__name__.partition(".")[0]
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and getattr(getattr(value, "__dataclass_params__", None), "frozen", False)
                and not value.__name__.startswith("_")
                and value.__module__.partition(".")[0] == top
            ):
                self.by_name[f"{value.__module__}.{value.__name__}"] = value

    def matches(self, name: str) -> list[str]:
        """The full names that a partial name may mean."""
        return sorted(full for full in self.by_name if f".{full}".endswith(f".{name}"))

    def resolve(self, name: str) -> str:
        """The full name of the one class that a name means.

        Raises:
          ConfigError: no such class, or several.
        """
        matches = [name] if name in self.by_name else self.matches(name)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(f"{name} is ambiguous; write one of {', '.join(matches)}")
        owner, _, field = name.rpartition(".")
        if owner and any(field in self.fields(match) for match in self.matches(owner)):
            raise ConfigError(f"{name} is a field; bind the class that it builds by its own name")
        known = [full.rpartition(".")[2] for full in self.by_name]
        otherwise = "; import the module of this frozen dataclass"
        raise ConfigError(f"no config class is called {name}{nearest_name(name, known, otherwise)}")

    def short(self, full: str) -> str:
        """The shortest partial name that means only this class."""
        parts = full.split(".")
        suffixes = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        return next((suffix for suffix in suffixes if self.matches(suffix) == [full]), full)

    def fields(self, full: str) -> Mapping[str, inspect.Parameter]:
        """The parameters of a class, by its full name."""
        return inspect.signature(self.by_name[full]).parameters


_OWN = {"seqeff", "seqeff_kernels"}
_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
_imported: dict[str, dict[str, Path]] = {}


def import_module(name: str, folders: Iterable[str | Path]) -> tuple[ModuleType, dict[str, Path]]:
    """Imports a module, looking in the folders first.

    Returns:
      The module, and the source files of it and of the modules that it brought with it, without
      those of installed packages, by module name, where a package's is `package.__init__`.

    Raises:
      ConfigError: there is no such module, its name is taken, or it fails while it is imported.
    """
    top = name.partition(".")[0]
    searched = list(dict.fromkeys(os.path.realpath(folder) for folder in folders))
    added = [] if top in _OWN else searched
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        found = PathFinder.find_spec(top)
        _forget_namesake(top, found)
        before = set(sys.modules)
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not _is_part(error.name, name):
            raise ConfigError(f"import {name}: {error}") from error
        known = {file.stem for folder in searched for file in Path(folder).glob("*.py")}
        where = f"no module {name} in {' or '.join(searched)}, and none is installed"
        raise ConfigError(where + nearest_name(name, known)) from None
    except ConfigError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        file, line = frame.filename, frame.lineno
        if isinstance(error, SyntaxError):
            file, line = error.filename, error.lineno
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"import {name}: {file}:{line}: {reason}") from error
    finally:
        for folder in added:
            sys.path.remove(folder)
    origin = _origin(found)
    home = next((folder for folder in searched if Path(folder) in Path(origin).parents), None)
    if home is not None and home not in sys.path:
        sys.path.append(home)  # for what the module imports later, and for spawned processes
    parts = name.split(".")
    parents = {".".join(parts[: depth + 1]) for depth in range(len(parts))}
    sources = {
        new: source
        for new in sorted(set(sys.modules) - before | parents)
        if (source := _source_outside_packages(new)) is not None
    }
    sources = _imported.setdefault(name, sources)
    return module, {
        f"{new}.__init__" if source.stem == "__init__" else new: source
        for new, source in sources.items()
    }


def _is_part(missing: str | None, name: str) -> bool:
    return missing is not None and f"{name}.".startswith(f"{missing}.")


def _origin(spec: ModuleSpec | None) -> str:
    """The file of a module, or the first folder of a package without `__init__`."""
    if spec is None:
        return ""
    return os.path.realpath(spec.origin or next(iter(spec.submodule_search_locations or ()), ""))


def _forget_namesake(name: str, found: ModuleSpec | None) -> None:
    """Makes room for a module of the same name as one that an earlier config had in its folder."""
    loaded = sys.modules.get(name)
    if loaded is None or found is None or _origin(loaded.__spec__) == _origin(found):
        return
    earlier = [module for module in _imported if module.partition(".")[0] == name]
    if not earlier:
        raise ConfigError(f"{_origin(found)} is hidden by another loaded module {name}; rename it")
    for module in earlier:
        for brought in _imported.pop(module):
            sys.modules.pop(brought, None)


def _source_outside_packages(name: str) -> Path | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not file.endswith(".py") or name.partition(".")[0] in _OWN:
        return None
    path = Path(file).resolve()
    return None if any(path.is_relative_to(folder) for folder in _INSTALLED) else path
