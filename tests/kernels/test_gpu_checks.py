"""What the GPU checks cover; they themselves need a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from seqeff_kernels import decode_attention, range_attention, rotate_and_append
from seqeff_kernels.decode_attention import mosaic as decode_mosaic
from seqeff_kernels.decode_attention import triton as decode_triton
from seqeff_kernels.range_attention import cudnn, mosaic, triton
from seqeff_kernels.rotate_and_append import triton as append_triton

FOLDER = Path(__file__).parents[2] / "experiments" / "gpu_checks"


@pytest.fixture(scope="module")
def cases():
    sys.path.insert(0, str(FOLDER))
    try:
        from append_cases import APPEND_CASES
        from decode_cases import DECODE_CASES
        from range_cases import RANGE_CASES
    finally:
        sys.path.remove(str(FOLDER))
    return {
        range_attention: RANGE_CASES,
        decode_attention: DECODE_CASES,
        rotate_and_append: APPEND_CASES,
    }


@pytest.mark.parametrize(
    "operation, name, backend",
    [
        (range_attention, "cudnn", cudnn),
        (range_attention, "mosaic", mosaic),
        (range_attention, "triton", triton),
        (decode_attention, "mosaic", decode_mosaic),
        (decode_attention, "triton", decode_triton),
        (rotate_and_append, "triton", append_triton),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_that_auto_takes_has_a_check(cases, operation, name, backend):
    covered = {(c.head_dim, c.dtype) for c in cases[operation] if c.backend == name}
    assert covered >= backend.TESTED


@pytest.mark.parametrize("window", ["None", "window"])
def test_the_backward_of_cudnn_itself_has_a_check(cases, window):
    covered = {
        (case.head_dim, case.dtype)
        for case in cases[range_attention]
        if case.backend == "cudnn"
        and not case.logsumexp
        and (case.settings["window"] is None) == (window == "None")
    }
    assert covered >= cudnn.TESTED


def test_no_case_is_there_twice(cases):
    for listed in cases.values():
        described = [str(case.describe()) for case in listed]
        assert len(set(described)) == len(described)
