"""The check for machines with a GPU runs to its end here, on the CPU, so that its first real run does."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_does_every_step(tmp_path):
    done = run("--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "dry.json").read_text())
    assert {name: step["status"] for name, step in report["steps"].items()} == dict.fromkeys(
        (
            "build",
            "compile ahead",
            "tests",
            "limits",
            "search",
            "training step",
            "residual quantiser",
            "kernels",
            "tiles",
        ),
        "ok",
    )
    results = {name: step["result"] for name, step in report["steps"].items()}
    timed = results["search"]
    assert {row["contender"] for row in timed} >= {"fastvq triton", "naive cdist", "torch.compile of naive matmul"}
    assert all(row["ms"] > 0 and row["of_matrix_rate"] > 0 for row in timed), timed
    assert " passed" in results["tests"]["summary"]
    assert all(row["ms"] > 0 for name in ("training step", "residual quantiser") for row in results[name])
    assert "fastvq triton" in (tmp_path / "dry.md").read_text()


def test_without_a_gpu_it_says_so():
    if not torch.cuda.is_available():
        done = run("--out", "/nonexistent")
        assert done.returncode == 2
        assert "no GPU" in done.stderr
