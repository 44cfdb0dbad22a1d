"""`python -m fastvq.info`, as a user runs it."""

import json
import os
import subprocess
import sys

import pytest

import fastvq
from fastvq.backends import select


def info(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTVQ_")}
    command = [sys.executable, "-m", "fastvq.info", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)


def test_json_says_all_that_the_text_says():
    done = info("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["fastvq"] == fastvq.__version__
    assert report["serving"]["cpu"] == {"backend": "cpu", "why": None}
    assert report["instruction_sets"]["in_use"] == report["instruction_sets"]["available"][-1]
    assert set(report["backends"]) == set(select.BACKENDS) - {"auto"}
    text = info().stdout
    for words in (report["versions"]["torch"], report["instruction_sets"]["in_use"], report["devices"]["cpu"]):
        assert words in text


def test_the_instruction_set_asked_for_is_the_one_in_use():
    report = json.loads(info("--json", FASTVQ_CPU_ISA="portable", FASTVQ_BACKEND="reference").stdout)
    assert report["instruction_sets"]["in_use"] == "portable"
    assert report["requested"] == "reference"


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--fast"], {}, "unrecognized arguments: --fast"),
        (["--explain", "100", "0", "8", "float32"], {}, "K must be a whole number, at least 1; got 0"),
        (["--explain", "100", "10", "8", "int8"], {}, "DTYPE must be one of float32, bfloat16, float16, float64"),
        ([], {"FASTVQ_BACKEND": "gpu"}, "FASTVQ_BACKEND must be one of"),
        ([], {"FASTVQ_CPU_ISA": "mmx"}, "FASTVQ_CPU_ISA must be one of"),
    ],
)
def test_errors_are_one_line(arguments, environment, words):
    done = info(*arguments, **environment)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_explain_gives_a_reason_a_line():
    done = info("--explain", "16384", "1024", "64", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("16384 rows, 1024 codes, 64 dimensions, bfloat16; kernels:")
    lines = [line for line in done.stdout.splitlines() if line.startswith("  search ")]
    assert lines
    assert all(len(line.split(maxsplit=2)) == 3 for line in lines)
