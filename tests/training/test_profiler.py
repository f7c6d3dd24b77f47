import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from seqeff.checks import UserError
from seqeff.training.profiler import Profiler

FULL_DISK = """
import pathlib, resource, sys
from seqeff.checks import UserError
from seqeff.training.profiler import Profiler

try:
    with Profiler((2, int(sys.argv[2])), pathlib.Path(sys.argv[1])) as profiler:
        for step in range(1, 4):
            profiler.before(step, ())
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        if sys.argv[3] == "fails":
            raise ZeroDivisionError
except (UserError, ZeroDivisionError) as error:
    print(type(error).__name__, error)
"""


def recordings(directory: Path) -> int:
    return len(list(directory.glob("**/*.xplane.pb")))


def test_a_window_is_recorded(tmp_path: Path) -> None:
    with Profiler((2, 2), tmp_path / "run/profile") as profiler:
        for step in range(1, 7):
            profiler.before(step, jnp.ones(3))
            assert recordings(tmp_path) == (step >= 4)


def test_the_end_of_the_run_ends_the_recording(tmp_path: Path) -> None:
    with Profiler((2, 9), tmp_path) as profiler:
        for step in range(1, 4):
            profiler.before(step, ())
        assert recordings(tmp_path) == 0
    assert recordings(tmp_path) == 1


def test_without_a_window_nothing_is_recorded(tmp_path: Path) -> None:
    with Profiler(None, tmp_path) as profiler:
        for step in range(1, 4):
            profiler.before(step, ())
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write the profile to .*: Not a directory; free"),
        Profiler((1, 1), tmp_path / "file/profile") as profiler,
    ):
        profiler.before(1, ())


@pytest.mark.parametrize(
    ("steps", "end", "message"),
    [
        (1, "well", "UserError cannot write the profile to {}: File too large; free space there"),
        (9, "well", "UserError cannot write the profile to {}: File too large; free space there"),
        (9, "fails", "ZeroDivisionError"),
    ],
)
def test_a_full_disk_is_a_user_error(steps: int, end: str, message: str, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(steps), end],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(message.format(tmp_path))
    assert finished.stdout.count("\n") == 1
