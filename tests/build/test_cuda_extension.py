"""The CUDA extension where nvcc built it: it imports without a driver, quickly, and says at the first call what is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvq.backends import cuda

ROOT = Path(__file__).parents[2]
PATH = importlib.util.find_spec("fastvq._cuda")

built = pytest.mark.skipif(PATH is None, reason="fastvq was built without nvcc")

spec = importlib.util.spec_from_file_location("fastvq_setup", ROOT / "setup.py")
assert spec is not None
assert spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

IMPORT = f"""
import importlib.util, time
spec = importlib.util.spec_from_file_location("_cuda", {PATH.origin if PATH else ""!r})
start = time.perf_counter()
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(time.perf_counter() - start)
"""


@built
def test_it_imports_within_50_ms_and_needs_no_torch_and_no_driver() -> None:
    times = [
        float(subprocess.run([sys.executable, "-I", "-c", IMPORT], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(times) < 0.05, times


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_first_call_says_what_is_missing() -> None:
    assert "no CUDA device" in str(cuda.missing())
    state = [torch.ones(4, 2), torch.ones(4), torch.ones(4, 2), torch.ones(4), torch.ones(4, 2)]
    with pytest.raises(RuntimeError, match=r"fastvq CUDA operator ema_update_: .*(driver|device)"):
        cuda.ema_update_(*state, 0.9, 1e-5)


def test_without_the_extension_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_kernels", None)
    assert "built without its CUDA extension" in str(cuda.missing())


@pytest.mark.parametrize(
    ("wanted", "machine_code", "ptx"),
    [
        ("", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"], ["compute_120"]),
        ("90a", ["sm_90a"], []),  # its PTX would run nowhere else
        ("80; 90", ["sm_80", "sm_90"], ["compute_90"]),
        ("89,", ["sm_89"], ["compute_89"]),
    ],
)
def test_architectures(monkeypatch: pytest.MonkeyPatch, wanted: str, machine_code: list[str], ptx: list[str]) -> None:
    monkeypatch.setenv("FASTVQ_CUDA_ARCHITECTURES", wanted)
    assert [flag.split("code=")[-1] for flag in build.cuda_targets()] == machine_code + ptx


def test_an_architecture_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVQ_CUDA_ARCHITECTURES", "hopper")
    with pytest.raises(ValueError, match=r"FASTVQ_CUDA_ARCHITECTURES must name architectures such as 80 or 90a; got"):
        build.cuda_targets()
