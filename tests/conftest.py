"""Eight simulated CPU devices for every test, set before JAX starts its backends; a tiny run."""

import os
import shutil

import pytest

_FLAG = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()

import jax  # noqa: E402
import tiny_run  # noqa: E402
from jax._src import xla_bridge  # noqa: E402


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def quick_compilation(compilation_cache):
    with tiny_run.quick_compilation(compilation_cache):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A config that trains in a second once it is compiled, and its corpus."""
    return tiny_run.Tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tiny, compilation_cache):
    """The directory of a run of `tiny` to its end; not to be changed."""
    run_dir = tiny.folder / "finished"
    with tiny_run.quick_compilation(compilation_cache):
        result = tiny.train(run_dir)
    assert result.status == 0, result.errors
    return run_dir


@pytest.fixture
def no_devices(monkeypatch):
    """Any use of a device, or start of a backend, fails."""

    def fail(*_, **__):
        raise AssertionError("a device was touched")

    for name in ("devices", "local_devices", "device_put", "jit"):
        monkeypatch.setattr(jax, name, fail)
    for name in ("backends", "get_backend"):
        monkeypatch.setattr(xla_bridge, name, fail)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of `finished` to do anything with."""
    return shutil.copytree(finished, tmp_path / "copied")


@pytest.fixture
def not_finite(finished, monkeypatch):
    """`finished`, as one whose parameters are no numbers."""
    from seqeff.training import restore

    whole = restore.restore

    def broken(*arguments):
        program, parameters = whole(*arguments)
        return program, jax.tree.map(lambda x: x * float("nan"), parameters)

    monkeypatch.setattr(restore, "restore", broken)
    return finished
