"""Every kernel, compiled for devices that are not here, and its machine code looked at; in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command):
    """Standard output of a Python program that compiles; its text where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-10_000:]}{done.stderr[-5_000:]}", pytrace=False)
    return done.stdout


def test_the_gate_finds_seeded_faults():
    faults = json.loads(run("tests/kernels/seeded_faults.py"))
    assert faults["sound"] == faults["float32 needs no tensor instruction"] == []
    assert faults["too few rows for a warp group"] == ["a product of f16 without HGMMA"]
    assert "touch local memory" in faults["too many registers"][0]
    assert "touch local memory" in faults["too many registers on AMD"][0]
    assert faults["too much shared memory"] == ["262144 bytes of shared memory, the device has 101376"]


@pytest.mark.soak  # one of 580 launches still touches local memory: the screen of float32 rows, D = 1024, on sm_120
def test_every_kernel_passes_the_gate_on_every_device():
    run("-m", "benchmarks.kernel_gate")


@pytest.mark.soak
def test_every_launch_of_the_sweep_passes_the_gate():
    run("-m", "benchmarks.kernel_gate", "--all")


def test_no_kernel_is_worse_than_the_committed_table():
    run("-m", "benchmarks.kernel_report", "--check")


def test_the_table_holds_what_was_aimed_at():
    from benchmarks.kernel_report import read

    screen = {(row["arch"], row["D"]): row for row in read() if row["kernel"] == "screen_kernel"}
    assert float(screen["sm_90", "64"]["alu"]) <= 2.4
    assert float(screen["sm_90", "64"]["shuffles"]) == 0
    assert float(screen["sm_90", "256"]["tensor"]) >= 0.9


def test_a_worse_kernel_is_found():
    from benchmarks.kernel_report import check, read

    committed = read()
    assert check(committed, committed) == []
    row = next(row for row in committed if row["kernel"] == "screen_kernel")
    for name, value in (("alu", "9"), ("shuffles", "1"), ("spills", "1"), ("blocks", "0"), ("tensor", "0.01")):
        assert len(check([row | {name: value}], committed)) == 1, name
    assert "not in the table" in check([row | {"D": "7"}], committed)[0]
