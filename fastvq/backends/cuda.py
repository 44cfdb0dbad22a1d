"""CUDA C++ kernels: the extension has its place, its kernels are not there yet; asking for them says so."""

from __future__ import annotations

import importlib


def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    try:
        extension = importlib.import_module("fastvq._cuda")
    except ImportError:
        return "fastvq was built without CUDA (no nvcc then); fastvq has no CUDA kernels yet either"
    devices, error = extension.device_count()
    if devices == 0:
        return f"no CUDA device ({error or 'the driver shows none'}); fastvq has no CUDA kernels yet either"
    return "fastvq has no CUDA kernels yet"
