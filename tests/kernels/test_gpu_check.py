"""The check for machines with a GPU runs to its end here, on the CPU, so that its first real run does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check
from fastvq.backends import triton

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_does_every_step(tmp_path):
    done = run("--dry", "--out", str(tmp_path), CUDA_HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "dry.json").read_text())
    assert {name: step["status"] for name, step in report["steps"].items()} == dict.fromkeys(
        (
            "build",
            "compile ahead",
            "tests",
            "limits",
            "indices",
            "search",
            "training step",
            "residual quantiser",
            "kernels",
            "tiles",
            "sanitizer",
        ),
        "ok",
    )
    results = {name: step["result"] for name, step in report["steps"].items()}
    timed = results["search"]
    assert {row["contender"] for row in timed} >= {"fastvq triton", "naive cdist", "torch.compile of naive matmul"}
    flash = [row for row in timed if row["contender"] == "flash-kmeans"]
    assert flash, "flash-kmeans is installed for the tests"
    assert all("must be on CUDA" in row["why"] for row in flash)
    assert all(row["ms"] > 0 and row["of_matrix_rate"] > 0 for row in timed if row not in flash), timed
    assert results["compile ahead"]["launches"] > 3
    assert results["compile ahead"]["errors"] == []
    assert all(row["us"] for row in results["kernels"])
    assert all(row["usual_ms"] > 0 and len(row["ms"]) == 2 for row in results["tiles"]), results["tiles"]
    assert " passed" in results["tests"]["summary"]
    assert all(row["ms"] > 0 for name in ("training step", "residual quantiser") for row in results[name])
    page = (tmp_path / "dry.md").read_text()
    assert "fastvq triton" in page
    assert shutil.which("compute-sanitizer") or "memcheck: absent; racecheck: absent" in page


def test_an_index_that_differs_is_found(monkeypatch):
    def one_wrong(*arguments):
        indices, distances = triton.search(*arguments)
        indices[-1] += 1
        return indices, distances

    check = gpu_check.Check(dry=True, seconds=60)
    assert gpu_check.compare_indices(check) == {"shapes": len(gpu_check.DRY_SHAPES)}
    monkeypatch.setattr(gpu_check, "backends", lambda _: {"triton": triton, "cuda": SimpleNamespace(search=one_wrong)})
    with pytest.raises(AssertionError, match=r"reference at 70 x 40 x 16, bfloat16: \{'triton': 0, 'cuda': 1\}"):
        gpu_check.compare_indices(check)


@pytest.mark.parametrize(
    ("last", "status", "words"),
    [
        ("echo ERROR SUMMARY: 0 errors, $tool", "ok", "ERROR SUMMARY: 0 errors, racecheck"),
        ("exit 86", "failed", "memcheck, exit status 86: five operators on cpu"),
    ],
)
def test_every_operator_runs_under_each_sanitizer(tmp_path, last, status, words):
    """With a stand-in that runs the program as it is, and then finds nothing, or something."""
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(
        f'#!/bin/sh\n[ "$1 $3 $4" = "--tool --error-exitcode 86" ] || exit 3\ntool=$2\nshift 4\n"$@" && {last}\n'
    )
    stand_in.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run("--dry", "--only", "sanitizer", "--out", str(tmp_path), PATH=path)
    assert done.returncode == (status == "failed"), done.stderr
    step = json.loads((tmp_path / "dry.json").read_text())["steps"]["sanitizer"]
    assert step["status"] == status
    assert words in (step["result"]["racecheck"] if status == "ok" else step["why"])


def test_without_a_gpu_it_says_so():
    if not torch.cuda.is_available():
        done = run("--out", "/nonexistent")
        assert done.returncode == 2
        assert "no GPU" in done.stderr
