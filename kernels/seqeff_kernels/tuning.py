"""Plans that were measured to be best, by device and static shape.

`seqeff_kernels.tune` finds them. `tuned/<kind of device>.json` maps an operation, a backend and a
key to an entry: the fields of the backend's plan, and the milliseconds that it took.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax import Array
from jaxtyping import Float

from seqeff_kernels.range_attention.sources import Source, TokenSource

_Plan = TypeVar("_Plan")
# whose devices differ in their memory alone
_FAMILIES = (("H100", "H200"),)
# plans depend on the size of an element alone
_TWINS = {"bfloat16": "float16", "float16": "bfloat16"}
# between the window of a call and that of an entry which serves it
_MOST_OCTAVES = 2
FOLDER = Path(__file__).with_name("tuned")


def choose(operation: str, backend: str, key: str) -> dict[str, Any] | None:
    """The fields of the best plan for the default device, or None where no table lists the key.

    A key of attention takes, where exactly its own is absent, the listed one of the same head size
    and sources whose rows, heads of a KV head and window are nearest by ratio, and of two as near
    the one of fewer rows: what fits depends on none of them. A window may be four times as wide or
    narrow. Where none is listed of a 16-bit type, the entries of the other one serve. A plan of
    decoding fills the device with as many lists alone, and serves those that are longer too.

    Args:
      operation: `attention` or `decode`.
      backend: as in `range_attention`.
      key: of `attention_key` or `decode_key`.

    Raises:
      ValueError: the device's table is damaged.
    """
    listed = _device_table(operation).get(backend, {})
    found = _match_plan(operation, key, listed)
    return None if found is None else dict(listed[found]["plan"])


def planned(
    operation: str, backend: str, key: str, make: Callable[..., _Plan], default: Callable[[], _Plan]
) -> _Plan:
    """The best plan that is listed, made of its fields, or the default.

    Args:
      make: raises TypeError or ValueError where the fields are not those of a plan.

    Raises:
      ValueError: the device's table is damaged, or lists what is no plan; names file and entry.
    """
    fields = choose(operation, backend, key)
    if fields is None:
        return default()
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        listed = _match_plan(operation, key, _device_table(operation)[backend])
        of_backend = ((path, read(path).get(operation, {}).get(backend, {})) for path in _paths())
        path = next(path for path, entries in of_backend if listed in entries)
        raise ValueError(
            f"the table of tuned plans {path} has no plan in its entry of "
            f"{operation} {backend} {listed!r}: {error}"
        ) from error


def fastest(operation: str, key: str, backends: Sequence[str]) -> str | None:
    """Of backends whose entries the table lists, the one of the least time.

    Compared are entries of one key, the nearest that is listed for all of them, and of these the
    times of the longest pass that all of them have. Calls of the forward pass alone are ranked so
    too: whether a gradient is taken is not known where a call is traced, as `jit`, `scan` and
    `checkpoint` hide it. Decoding is ranked as at the nearest sizes of the same heads and points.

    Args:
      backends: the one to take where the table does not compare it comes first.

    Returns:
      a backend, or None where the first is not listed, no other is, or nothing of theirs compares.
    """
    table = _device_table(operation)
    listed = {
        backend: table[backend]
        for backend in backends
        if _match(key, table.get(backend, {})) is not None
    }
    if backends[0] not in listed or len(listed) < 2:
        return None
    shared = _match(key, _in_all(listed.values()))
    if shared is None:
        return None
    times = {backend: entries[shared]["milliseconds"] for backend, entries in listed.items()}
    passes = _in_all(times.values())
    if not passes:
        return None
    longest = max(sorted(passes), key=lambda timed: max(time[timed] for time in times.values()))
    return min(times, key=lambda backend: times[backend][longest])


def attention_key(
    queries: Float[Array, "batch rows heads head_dim"], sources: Sequence[Source]
) -> str:
    """The key of a call of `range_attention`; only shapes, dtypes and kinds of sources are read.

    Rows and windows are rounded up to powers of two.
    """
    _, rows, heads, head_dim = queries.shape
    group = heads // sources[0].keys.shape[2]
    kinds = "+".join(map(_kind, sources))
    return f"{queries.dtype} head_dim={head_dim} group={group} {kinds} rows={power_of_two(rows)}"


def decode_key(
    *, dtype: str, head_dim: int, kv_heads: int, points: int, batch: int, entries: int
) -> str:
    """The key of a call of `decode_attention`.

    Args:
      points: query rows times the heads of one KV head.
      batch: its product with the KV heads is rounded up to a power of two.
      entries: of all blocks and the new ones; rounded up to a power of two.
    """
    lists = power_of_two(batch * kv_heads)
    return (
        f"{dtype} head_dim={head_dim} kv_heads={kv_heads} points={points} lists={lists} "
        f"entries={power_of_two(entries)}"
    )


def power_of_two(count: int) -> int:
    """The smallest one that is not below `count`."""
    return 1 << (count - 1).bit_length()


def table_path(device_kind: str) -> Path:
    """The file of a kind of device."""
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', device_kind)}.json"


@functools.cache
def read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Entries by operation, backend and key; none where there is no such file.

    Raises:
      ValueError: the file is damaged; names an entry that lacks its plan or its times.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for operation, backends in table.items():
            for backend, entries in backends.items():
                for key, entry in entries.items():
                    _check_entry(entry, f"{operation} {backend} {key!r}")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"the table of tuned plans {path} is damaged: {error}") from error
    except AttributeError as error:
        raise ValueError(
            f"the table of tuned plans {path} is damaged: it does not list entries by operation, "
            "backend and key"
        ) from error
    return table


def record(path: Path, operation: str, backend: str, key: str, entry: Mapping[str, Any]) -> None:
    """Adds an entry to a file, or replaces the one there, atomically.

    Raises:
      ValueError: the entry lacks its plan or its times, or the file is damaged.
    """
    _check_entry(entry, f"{operation} {backend} {key!r}")
    read.cache_clear()
    table = json.loads(json.dumps(read(path)))
    table.setdefault(operation, {}).setdefault(backend, {})[key] = dict(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
    read.cache_clear()


def _check_entry(entry: Any, name: str) -> None:
    """Raises ValueError, naming the entry, if it does not hold a plan and its times."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"the entry of {name} is {entry!r}; give its plan and milliseconds")
    if not isinstance(entry.get("plan"), Mapping):
        raise ValueError(f"the entry of {name} has no plan; give the fields of one")
    times = entry.get("milliseconds")
    if not isinstance(times, Mapping) or not all(
        isinstance(time, (int, float)) for time in times.values()
    ):
        raise ValueError(f"the entry of {name} has no milliseconds; give a number for each pass")


def _device_table(operation: str) -> dict[str, dict[str, Any]]:
    """Entries of an operation by backend and key, those of a key all of one file of `_paths`."""
    table: dict[str, dict[str, Any]] = {}
    for path in reversed(_paths()):
        nearer = read(path).get(operation, {})
        keys = {key for entries in nearer.values() for key in entries}
        for entries in table.values():
            for key in keys & entries.keys():
                del entries[key]
        for backend, entries in nearer.items():
            table.setdefault(backend, {}).update(entries)
    return table


def _paths() -> list[Path]:
    """The table of the default device, then those of devices that differ in their memory alone."""
    kind = jax.devices()[0].device_kind
    own = table_path(kind)
    relatives = [name for family in _FAMILIES for name in family if _related(kind, family)]
    others = [path for path in sorted(FOLDER.glob("*.json")) if _related(path.stem, relatives)]
    return [own, *(path for path in others if path != own)]


def _related(kind: str, names: Sequence[str]) -> bool:
    return any(name in kind for name in names)


def _kind(source: Source) -> str:
    if isinstance(source, TokenSource):
        name = "causal" if source.window is None else f"window{power_of_two(source.window)}"
    else:
        name = "range" if source.packed is None else "packed"
    # each further array of queries takes room that a plan has to leave
    return name if source.queries is None else f"{name}(own queries)"


def _in_all(groups: Iterable[Iterable[str]]) -> set[str]:
    return set.intersection(*map(set, groups))


def _match(key: str, listed: Collection[str]) -> str | None:
    """The listed key that serves a call's, or None."""
    found = _nearest(key, listed)
    dtype, _, rest = key.partition(" ")
    if found is None and dtype in _TWINS:
        found = _nearest(f"{_TWINS[dtype]} {rest}", listed)
    return found


def _match_plan(operation: str, key: str, listed: Collection[str]) -> str | None:
    """The listed key whose plan serves a call's, or None."""
    if operation == "decode":
        listed = [other for other in listed if _fills(other, key)]
    return _match(key, listed)


def _fills(listed: str, key: str) -> bool:
    """Whether a plan of decoding is for as many lists, and these are no shorter."""
    found, wanted = _parse(listed), _parse(key)
    if found is None or wanted is None:
        return listed == key
    return found.group == wanted.group and found.rows <= wanted.rows


def _nearest(key: str, listed: Collection[str]) -> str | None:
    """The key itself or, where it is not listed, the one whose numbers are nearest by ratio."""
    if key in listed:
        return key
    wanted = _parse(key)
    if wanted is None:
        return None
    distances: dict[str, tuple[float, int]] = {}
    for other in listed:
        found = _parse(other)
        if found is None or found.kind != wanted.kind:
            continue
        window = abs(math.log2(found.window / wanted.window))
        if window > _MOST_OCTAVES:
            continue
        others = (found.group / wanted.group, found.rows / wanted.rows)
        # of two as near, the one of fewer rows
        distances[other] = window + sum(abs(math.log2(ratio)) for ratio in others), found.rows
    return min(distances, key=lambda other: distances[other], default=None)


class _Key(NamedTuple):
    """A key, with its numbers apart from what must be the same.

    Attributes:
      group: of decoding, the lists of entries.
      rows: of decoding, the entries of each.
    """

    kind: str
    group: int
    window: int
    rows: int


@functools.cache
def _parse(key: str) -> _Key | None:
    found = re.fullmatch(r"(.*) lists=(\d+) entries=(\d+)", key)
    if found is not None:
        return _Key(found[1], int(found[2]), 1, int(found[3]))
    found = re.fullmatch(r"(.*) group=(\d+) (.*?)(?:window(\d+)(.*))? rows=(\d+)", key)
    if found is None:
        return None
    before, group, kinds, window, after, rows = found.groups()
    kind = f"{before} {kinds}" if window is None else f"{before} {kinds}window{after}"
    return _Key(kind, int(group), int(window or 1), int(rows))
