"""The Triton kernels for CUDA and ROCm devices; on the CPU, Triton's interpreter runs them for tests."""

from __future__ import annotations

import importlib.util

from torch import Tensor


def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return "fastvq's Triton kernels are not complete yet"


def search(x: Tensor, codebook: Tensor, metric: str, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    """Indices (...), and squared distances or scores (...) when asked for, else an empty tensor."""
    from fastvq.kernels import search as kernels

    return kernels.search(x, codebook, metric, return_distance)
