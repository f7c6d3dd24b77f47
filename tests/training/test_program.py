"""What is set before the first use of a device."""

import dataclasses
import os

import jax
import pytest

from seqeff.checks import ConfigError, UserError
from seqeff.training.program import prepare_backend

FLAG = "--xla_gpu_deterministic_ops"


@pytest.fixture
def deterministic(tiny):
    return dataclasses.replace(tiny.load(), deterministic=True)


def test_determinism_is_asked_of_the_compiler(deterministic, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    prepare_backend(dataclasses.replace(deterministic, deterministic=False))
    assert os.environ["XLA_FLAGS"] == "--xla_other=1"
    for _ in range(2):
        prepare_backend(deterministic)
        assert os.environ["XLA_FLAGS"] == f"--xla_other=1 {FLAG}=true"


@pytest.mark.parametrize("value", ["", "=true", "=1"])
def test_flags_that_ask_for_it_already_stay(value, deterministic, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", FLAG + value)
    prepare_backend(deterministic)
    assert os.environ["XLA_FLAGS"] == FLAG + value


@pytest.mark.parametrize("flags", [f"{FLAG}=false", f"{FLAG}=true --xla_other=1 {FLAG}=0"])
def test_flags_that_forbid_it_are_refused(flags, deterministic, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(ConfigError, match=rf"XLA_FLAGS has {flags.split()[-1]}; take that flag"):
        prepare_backend(deterministic)


def test_it_cannot_be_asked_of_gpus_in_use(deterministic, monkeypatch):
    jax.devices()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match="start a new process for this config"):
        prepare_backend(deterministic)
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setenv("XLA_FLAGS", FLAG)
    prepare_backend(deterministic)
