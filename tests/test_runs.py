"""The files of a run directory."""

import os
import platform

import pytest

from seqeff.checks import UserError
from seqeff.runs import Origin, RunDirectory, versions, write_atomically


def test_a_text_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_operative_config_is_written_last(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    module = tmp_path / "mine.py"
    module.write_text("x = 1\n")
    origin = Origin("given", "operative", ("A.b=1",), {"mine": module, "pack.__init__": module})
    replace, order = os.replace, []

    def note(source, target):
        assert not run.exists()
        order.append(target.name)
        replace(source, target)

    with run.lock():
        monkeypatch.setattr(os, "replace", note)
        run.begin(origin)
    assert order[-1] == "operative_config.gin"
    assert run.require() is run
    assert run.config.read_text() == "given"
    assert run.overrides.read_text() == "A.b=1\n"
    assert (run.modules / "mine.py").read_text() == "x = 1\n"
    assert (run.modules / "pack/__init__.py").exists()


def test_changed_code_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "run")
    module, other = tmp_path / "a file.py", tmp_path / "other.py"
    module.write_bytes(b"x = 1\r\n")
    other.write_text("y = 1\n")
    modules = {"mine": module, "pack.__init__": module}
    run.path.mkdir()
    run.begin(Origin("given", "operative", (), modules))
    run.check_modules(modules | {"new": other})
    copy = run.modules / "pack/__init__.py"
    message = f"{other} is not the code that this run began with, {copy}; .*cp {other} {copy};"
    with pytest.raises(UserError, match=message):
        run.check_modules(modules | {"pack.__init__": other})
    module.write_text("x = 2\n")
    with pytest.raises(UserError, match=f"cp '{module}' {run.modules}/mine.py; or choose another"):
        run.check_modules({"mine": module})


def test_a_directory_in_which_nothing_began_is_removed(tmp_path):
    (tmp_path / "empty").mkdir()
    for run in (RunDirectory(tmp_path / "deep/er"), RunDirectory(tmp_path / "empty")):
        with pytest.raises(RuntimeError), run.lock():
            (run.path / "half").write_text("")
            raise RuntimeError
        assert not run.path.exists()


def test_what_a_killed_process_left_is_kept_and_used(tmp_path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / "tokenizer").mkdir()
    with RunDirectory(tmp_path).lock():
        pass
    assert (tmp_path / "tokenizer").exists()


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.gin").write_text("mine")
    with pytest.raises(UserError, match="neither empty nor a run directory"):
        RunDirectory(tmp_path).lock().__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["config.gin"]


def test_only_one_process_holds_the_lock(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.lock():
        with pytest.raises(UserError, match="another process is training"):
            RunDirectory(run.path).lock().__enter__()
        assert run.path.exists()
        run.begin(Origin())
    with run.lock():
        assert run.exists()


@pytest.mark.parametrize("method", ["lock", "begin", "add_sample"])
def test_a_path_that_cannot_be_written_is_told(method, tmp_path):
    (tmp_path / "file").write_text("")
    run = RunDirectory(tmp_path / "file/run")
    with pytest.raises(
        UserError, match=r"cannot write the run directory .*: Not a directory; free"
    ):
        if method == "lock":
            run.lock().__enter__()
        elif method == "begin":
            run.begin(Origin())
        else:
            run.add_sample(3, "text")


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"is not a run directory: it has no operative_config\.gin"):
        RunDirectory(tmp_path).require()


def test_a_sample_takes_the_place_of_one_of_its_step(tmp_path):
    run = RunDirectory(tmp_path)
    run.add_sample(5, "once")
    run.add_sample(5, "again")
    run.add_sample(6, "more")
    assert {path.name: path.read_text() for path in run.samples.iterdir()} == {
        "5.txt": "again\n",
        "6.txt": "more\n",
    }


def test_versions_name_what_matters():
    found = versions()
    # not the release of the kernel, which names the machine
    assert found["platform"] == f"{platform.system()} {platform.machine()}"
    assert {"jax", "flax", "optax", "orbax-checkpoint", "seqeff"} <= found["packages"].keys()
    assert found["packages"]["jax"]
    assert found["python"].startswith("3.")
