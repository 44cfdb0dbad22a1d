"""The machine code of the CUDA search, where nvcc built the extension: its targets, and no worse than the table."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import cuda_report

if importlib.util.find_spec("fastvq._cuda") is None:
    pytest.skip("fastvq was built without nvcc", allow_module_level=True)


LIBRARY = Path(importlib.util.find_spec("fastvq._cuda").origin)


def test_policies_with_a_target_meet_it():
    rows = cuda_report.measure(LIBRARY, targets_only=True)
    assert rows
    assert not cuda_report.check(rows, cuda_report.read())


@pytest.mark.soak
def test_no_policy_is_worse_than_the_table():
    assert not cuda_report.check(cuda_report.measure(LIBRARY), cuda_report.read())


def test_a_worse_line_is_complained_of():
    lines = cuda_report.read()
    assert not cuda_report.check(lines, lines)
    worse = [line | {"alu": "1.99", "tensor": "0.50", "spills": "3"} for line in lines]
    complaints = cuda_report.check(worse, lines)
    assert len(complaints) >= 3 * len(lines)
    assert "sm_90 stored streamed 64: 1.99 ALU operations an element, 1.5 are allowed" in complaints
    assert "sm_80 rounded streamed 64: tensor-bound for 0.50 of the time, 0.9 is asked for" in complaints
