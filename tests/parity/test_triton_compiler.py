"""The Triton kernels of untuned plans, compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

KERNELS = "add attend entries_gradient forward gather merge queries_gradient rotate_and_append"


@pytest.mark.parametrize(
    ("capability", "kibibytes", "head_dim"),
    [(80, 163, 256), (86, 99, 128), (86, 99, 256), (90, 227, 64), (100, 227, 64)],
)
def test_every_kernel_compiles_and_fits(capability, kibibytes, head_dim, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # nothing that an earlier run compiled
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("triton_compiler.py")
    found = subprocess.run(
        [sys.executable, script, *map(str, (capability, kibibytes, head_dim))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == KERNELS.split()
