"""What the tests of the CUDA backend share: programs and a module compiled against the shim, once a session."""

import ctypes
import os
from pathlib import Path

import pytest
from shimmed import RACES, SANITIZERS, compile_module, compile_shim, load_module

from fastvq.backends import cuda


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    """The program of faults.cu: as most tests run it, under AddressSanitizer and UBSan, and with its races watched."""
    source = Path(__file__).parent / "faults.cu"
    programs = {}
    for name, flags, source_flags in (("plain", [], []), ("sanitized", SANITIZERS, []), ("watched", [], RACES)):
        folder = tmp_path_factory.mktemp(name)
        programs[name] = compile_shim(folder, folder / "faults", [source], flags, source_flags=source_flags)
    return programs


@pytest.fixture(scope="session")
def shim_module(tmp_path_factory):
    """The bindings, the host code and the kernels, compiled against the shim, as a Python module.

    test_cuda_sanitizers.py has a process of its own import what it has compiled.
    """
    path = os.environ.get("FASTVQ_CUDA_SHIM") or compile_module(tmp_path_factory.mktemp("module"))
    return load_module(path)


@pytest.fixture
def kernels(shim_module, monkeypatch):
    """fastvq.backends.cuda on CPU tensors."""
    monkeypatch.setattr(cuda, "_kernels", shim_module)
    return shim_module


@pytest.fixture
def by_sorting(shim_module, monkeypatch):
    """Sums by code as if none fitted shared memory."""
    monkeypatch.setattr(shim_module, "small_sums_parts", lambda *_: 0)


@pytest.fixture(params=["in shared memory", "sorted"])
def way(request):
    """Both ways to sums by code, where both can go."""
    if request.param == "sorted":
        request.getfixturevalue("by_sorting")
    return request.param


@pytest.fixture(params=[1, 2, 3])
def seed(request, shim_module):
    """Several orders in which warps and lanes run."""
    ctypes.CDLL(shim_module.__file__).fastvq_shim_seed(ctypes.c_uint64(request.param))
    return request.param
