"""What is available here: devices, methods, backends, packages."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqeff.config import PACKAGES
from seqeff.config.modules import Classes
from seqeff.runs import versions
from seqeff_kernels.decode_attention import CacheBlock
from seqeff_kernels.decode_attention import explain as explain_decoding
from seqeff_kernels.range_attention import PackedIndices, RangeSource, TokenSource, explain
from seqeff_kernels.rotate_and_append import explain as explain_appending

_OPTIONAL = {
    "wandb": ("wandb", "Train.tracker = @Wandb()", "wandb"),
    "triton": ("triton", "Triton kernels on NVIDIA GPUs", "'seqeff[gpu]'"),
    "matplotlib": ("matplotlib", "plots of eval --plot", "'seqeff[plot]'"),
    "lm_eval": ("lm_eval", "tasks of eval --harness", "'seqeff[harness]'"),
    "torch": ("torch", "comparisons with PyTorch", "'seqeff[parity]'"),
}
# jax raises the latter where a platform was asked for that none of its plugins offers
_NO_DEVICE = (RuntimeError, AssertionError)
_BATCH, _LENGTH, _HEADS, _HEAD_DIM, _WINDOW, _SEPARATORS = 16, 2048, 12, 64, 64, 256


def describe() -> str:
    """Devices, packages, the configs that may be bound, and what serves attention, in words."""
    found = versions()
    packages = ", ".join(f"{name} {it}" for name, it in found["packages"].items() if it)
    sections = [
        f"Python {found['python']} on {found['platform']}\n{packages}",
        "\n".join(_devices()),
        "\n".join(["configs, by what they serve as:", *_methods()]),
        "\n".join(_backends()),
        "\n".join(["optional packages:", *_optional()]),
    ]
    return "\n\n".join(sections)


def _devices() -> Iterator[str]:
    try:
        devices = jax.devices()
    except _NO_DEVICE as error:
        yield f"devices: none; {_reason(error)}"
        return
    kinds = [device.device_kind for device in devices]
    counted = ", ".join(f"{kinds.count(kind)} of kind {kind}" for kind in dict.fromkeys(kinds))
    yield f"devices: {counted}"
    if devices[0].platform == "cpu":
        asked = os.environ.get("JAX_PLATFORMS")
        reason = f"JAX_PLATFORMS is {asked}" if asked else "none is here, or jax lacks its plugin"
        yield f"  no accelerator: {reason}"


def _methods() -> Iterator[str]:
    """The configs that a run can hold, under the protocol of the field that takes them."""
    from seqeff.training import Train

    classes = Classes()
    for package in PACKAGES:
        classes.add_package(package)
    found: dict[str, list[str]] = {}
    waiting: list[Any] = [Train]
    seen: set[Any] = set()
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        for kind in _kinds(cls):
            if dataclasses.is_dataclass(kind):
                waiting.append(kind)
            elif getattr(kind, "_is_protocol", False):
                serving = [cls for cls in classes.by_name.values() if _fulfils(cls, kind)]
                found[kind.__name__] = sorted(cls.__name__ for cls in serving)
                waiting += serving
    for protocol, names in sorted(found.items()):
        yield f"  {protocol}: {', '.join(names)}"


def _kinds(cls: type) -> Iterator[Any]:
    """The classes that its fields' types are made of."""
    waiting = list(typing.get_type_hints(cls).values())
    while waiting:
        hint = waiting.pop()
        if inspect.isclass(hint):
            yield hint
        waiting += typing.get_args(hint)


def _fulfils(cls: type, protocol: type) -> bool:
    own = {field.name for field in dataclasses.fields(cls)}
    for name, member in vars(protocol).items():
        if name.startswith("_"):
            continue
        if not (name in own or hasattr(cls, name)):
            return False
        # many protocols have a `make`; its parameters tell them apart
        if inspect.isfunction(member):
            mine = getattr(cls, name, None)
            if not callable(mine) or _parameters(member) != _parameters(mine):
                return False
    return True


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def _backends() -> Iterator[str]:
    """Backends of dense and of separator attention, and why one cannot serve."""

    def array(*shape: int, dtype: type = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def block(entries: int) -> CacheBlock:
        heads = array(_BATCH, entries, _HEADS, _HEAD_DIM)
        return CacheBlock(heads, heads, array(_BATCH, dtype=jnp.int32))

    tokens, token = (array(_BATCH, rows, _HEADS, _HEAD_DIM) for rows in (_LENGTH, 1))
    bounds = array(_BATCH, _LENGTH, dtype=jnp.int32)
    packed = PackedIndices(bounds, bounds)
    sizes = f"{_BATCH} rows of {_LENGTH} tokens, {_HEADS} heads of {_HEAD_DIM}, bfloat16"
    yield f"backends of range_attention, for {sizes}:"
    for name, sources in {
        "dense": [TokenSource(tokens, tokens)],
        "dense, documents kept apart": [TokenSource(tokens, tokens, document_start=bounds)],
        "separator": [
            RangeSource(tokens, tokens, start=bounds, end=bounds, packed=packed),
            TokenSource(tokens, tokens, window=_WINDOW),
        ],
    }.items():
        yield from _answers(name, lambda sources=sources: explain(tokens, sources))
    yield f"backends of decode_attention, for a token after each of {sizes}:"
    for name, blocks in {
        "dense": [block(_LENGTH)],
        "separator": [block(_SEPARATORS), block(_WINDOW)],
    }.items():
        yield from _answers(name, lambda blocks=blocks: explain_decoding(token, blocks))
    joined = array(_BATCH, 1, 3 * _HEADS * _HEAD_DIM)
    yield "backends of rotate_and_append, for such a token:"
    yield from _answers("in a cache", lambda: explain_appending(joined, tokens))


def _answers(name: str, ask: Callable[[], Mapping[str, str]]) -> Iterator[str]:
    """What the backends answer, or why there is no device."""
    yield f"  {name}"
    try:
        answers = ask()
    except _NO_DEVICE as error:
        answers = {"none": _reason(error)}
    for backend, answer in answers.items():
        yield f"    {backend}: {answer}"


def _optional() -> Iterator[str]:
    for module, (package, purpose, install) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield f"  {package}: absent; for {purpose}: pip install {install}"
            continue
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "present"
        yield f"  {package} {version}: for {purpose}"


def _reason(error: Exception) -> str:
    asked = f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')}"
    return str(error).strip().partition("\n")[0] or asked
