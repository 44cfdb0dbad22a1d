"""The operators once more, in a process of their own, compiled with AddressSanitizer and UBSan."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shimmed import SANITIZERS, compile_module

HERE = Path(__file__).parent
# Of each file what reaches every kernel: types, shapes, strides, several blocks.
CHOSEN = "families or shapes or several or many_rows or masks or strided or heads or chunks"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """An environment in which tests find the sanitized module, and Python starts with the sanitizer's library."""
    module = compile_module(tmp_path_factory.mktemp("sanitized"), SANITIZERS)
    compiler = os.environ.get("CXX", "c++").split()
    # The C++ library too, or exceptions thrown before the module is there find the sanitizer unprepared.
    libraries = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "FASTVQ_CUDA_SHIM": str(module),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }


def passes(sanitized, names, chosen):
    """Run the chosen tests of some files in the environment."""
    files = [str(HERE / f"test_cuda_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=sanitized, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_operators_under_sanitizers(sanitized):
    passes(sanitized, ("vector_quantize", "sort", "code_sums", "ema_update", "residual_quantize"), CHOSEN)


def test_search_under_sanitizers(sanitized):
    sizes = "dimensions and (8-float32 or 31-float32 or 300 or 33-bfloat16 or 64-float64)"  # one of every policy's kind
    passes(sanitized, ("search",), f"({sizes}) or boundary or (stages and shapes and not 300)")
