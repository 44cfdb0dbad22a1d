"""The Triton kernels for CUDA and ROCm devices; on the CPU, Triton's interpreter runs them for tests."""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from fastvq.kernels import launch

    if not launch.interpreted() and not torch.cuda.is_available():
        return "Triton finds no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU, for tests)"
    return None


def serves(device_type: str) -> bool:
    """Whether tensors on such a device can be given to this backend."""
    from fastvq.kernels import launch

    return device_type == ("cpu" if launch.interpreted() else "cuda")
