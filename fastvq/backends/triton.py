"""The Triton kernels for CUDA and ROCm devices; on the CPU, Triton's interpreter runs them for tests."""

from __future__ import annotations

import importlib.util


def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return "fastvq's Triton kernels are not complete yet"
