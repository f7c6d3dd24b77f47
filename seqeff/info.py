"""What is available here: devices, methods, backends, packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp

from seqeff.config import PACKAGES
from seqeff.config.modules import Classes
from seqeff.runs import versions
from seqeff_kernels.range_attention import RangeSource, TokenSource, automatic, explain

_OPTIONAL = {
    "wandb": ("wandb", "Train.tracker = @Wandb()", "wandb"),
    "jax_triton": ("jax-triton", "Triton kernels on NVIDIA GPUs", "'seqeff[gpu]'"),
    "torch": ("torch", "comparisons with PyTorch", "'seqeff[parity]'"),
}
# jax raises the latter where a platform was asked for that none of its plugins offers
_NO_DEVICE = (RuntimeError, AssertionError)
_BATCH, _LENGTH, _HEADS, _HEAD_DIM, _WINDOW = 16, 2048, 12, 64, 64


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
    """The scanned configs, under each protocol that they fulfil."""
    classes = Classes()
    for package in PACKAGES:
        classes.add_package(package)
    protocols = {
        value
        for name, module in list(sys.modules.items())
        if name.startswith(PACKAGES)
        for value in vars(module).values()
        if getattr(value, "_is_protocol", False) and value.__module__ == name
    }
    for protocol in sorted(protocols, key=lambda protocol: protocol.__name__):
        names = sorted(cls.__name__ for cls in classes.by_name.values() if _fulfils(cls, protocol))
        if names:
            yield f"  {protocol.__name__}: {', '.join(names)}"


def _fulfils(cls: type, protocol: type) -> bool:
    own = {field.name for field in fields(cls)}
    for name, member in vars(protocol).items():
        if name.startswith("_"):
            continue
        if not (name in own or hasattr(cls, name)):
            return False
        # many protocols have a `make`; its parameters tell them apart
        if inspect.isfunction(member) and _parameters(member) != _parameters(getattr(cls, name)):
            return False
    return True


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def _backends() -> Iterator[str]:
    """Backends of dense and of separator attention, and why one cannot serve."""

    def array(*shape: int, dtype: type = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens = array(_BATCH, _LENGTH, _HEADS, _HEAD_DIM)
    bounds = array(_BATCH, _LENGTH, dtype=jnp.int32)
    cases = {
        "dense": [TokenSource(tokens, tokens)],
        "dense, documents kept apart": [TokenSource(tokens, tokens, document_start=bounds)],
        "separator": [
            RangeSource(tokens, tokens, start=bounds, end=bounds),
            TokenSource(tokens, tokens, window=_WINDOW),
        ],
    }
    yield (
        f"backends of range_attention, for {_BATCH} rows of {_LENGTH} tokens, {_HEADS} heads of "
        f"{_HEAD_DIM}, bfloat16:"
    )
    for name, sources in cases.items():
        yield f"  {name}"
        try:
            answers = {"auto": f"takes {automatic(tokens, sources)}", **explain(tokens, sources)}
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
