"""The Triton kernels for CUDA and ROCm devices; on the CPU, Triton's interpreter runs them for tests."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from fastvq.kernels import launch

    if launch.interpreted() or torch.cuda.is_available():
        return None
    return "Triton finds no CUDA or ROCm device (with TRITON_INTERPRET=1 it runs on the CPU, slowly, for tests)"


def serves(device_type: str) -> bool:
    """Whether tensors on such devices can be given to this backend in this process."""
    from fastvq.kernels import launch

    return device_type == ("cpu" if launch.interpreted() else "cuda")


def search(x: Tensor, codebook: Tensor, metric: str, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    """Indices (...), and squared distances or scores (...) when asked for, else an empty tensor."""
    from fastvq.kernels import search as kernels

    return kernels.search(x, codebook, metric, return_distance)


def vector_quantize(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D) in the dtype of x, indices (...), and the loss, a scalar."""
    from fastvq.kernels import vector_quantize as kernels

    return kernels.vector_quantize(x, codebook, metric, commitment_weight, codebook_weight, mask)


def vector_quantize_counted(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize`, and how many finite rows that the mask keeps took each code: counts ([H,] K), int64."""
    from fastvq.kernels import vector_quantize as kernels

    return kernels.vector_quantize_counted(x, codebook, metric, commitment_weight, codebook_weight, mask)


def vector_quantize_backward(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and commitment loss) and to the codebook (codebook loss)."""
    from fastvq.kernels import vector_quantize as kernels

    return kernels.vector_quantize_backward(
        *[grad_quantized, grad_loss, x, codebook, indices, mask],
        *[commitment_weight, codebook_weight, need_x, need_codebook],
    )


def code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Counts ([H,] K) and sums ([H,] K, D): float64 sums in row order, rounded once."""
    from fastvq.kernels import code_sums as kernels

    return kernels.code_sums(x, indices, codebook_size, mask, per_head)


def ema_update_(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    """The moving averages and the codebook, in place; float64 within, each stored tensor rounded once."""
    from fastvq.kernels import ema_update as kernels

    kernels.ema_update_(codebook, cluster_size, embed_avg, counts, sums, decay, eps)


def residual_quantize(x: Tensor, codebooks: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D), indices (..., Q), losses (Q,); residuals rounded once a stage."""
    from fastvq.kernels import residual_quantize as kernels

    return kernels.residual_quantize(x, codebooks, metric)


def residual_quantize_backward(
    grad_quantized: Tensor,
    grad_losses: Tensor,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and all losses) and to the codebooks (each stage's own loss)."""
    from fastvq.kernels import residual_quantize as kernels

    return kernels.residual_quantize_backward(
        grad_quantized, grad_losses, x, codebooks, indices, need_x, need_codebooks
    )
