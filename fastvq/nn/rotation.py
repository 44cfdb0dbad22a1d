"""The rotation trick (Fifty et al., 2024, arXiv:2410.06424): a gradient that turns as x turns to its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RotateGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        x, quantized = ctx.saved_tensors
        return None, torch.ops.fastvq.rotate_back(grad, x, quantized, None, None)


def rotate_gradient(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` as it is; its gradient is turned and scaled back by what takes x to it.

    Write q for a row of quantized, u = x / |x|, p = q / |q|, w = (u + p) / |u + p|. Then q = R x with
    R = |q| / |x| (I - 2 w w' + 2 p u'), a rotation and a scaling, held constant in the backward pass (section 4.2 of
    the paper): the gradient g of the output leaves as R' g = |q| / |x| (g - 2 w (w.g) + 2 u (p.g)), O(D) a row. With
    the straight-through gradient of `fastvq.vector_quantize` it goes on to x. Norms below 1e-6 count as 1e-6.

    Args:
        x: (..., D), the rows that were quantised; no gradient goes to them from here.
        quantized: (..., D), their codes.

    Returns:
        (..., D), exactly `quantized`.
    """
    rotated: Tensor = _RotateGradient.apply(x.detach(), quantized)
    return rotated


class _RotateResidualGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, quantized: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, _, indices, codebooks = inputs
        ctx.save_for_backward(x, indices, codebooks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, indices, codebooks = ctx.saved_tensors
        return torch.ops.fastvq.rotate_back(grad, x, codebooks, indices, None), None, None, None


def rotate_residual_gradient(x: Tensor, quantized: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    """`quantized` as it is; its gradient reaches x through every stage, turned there as by `rotate_gradient`.

    With r_q what stage q quantises, to c_q, and R_q the rotation and scaling from r_q to c_q: the gradient g of the
    output arrives as the sum of all R_q' g. The residuals are made again in the backward pass, so that only x, the
    codes and the indices are kept.

    Args:
        x: (..., D), float32 or float64.
        quantized: (..., D), the sum of the codes; no gradient goes to it.
        indices: (..., Q).
        codebooks: (Q, K, D), any floating dtype; no gradient goes to them.

    Returns:
        (..., D), exactly `quantized`.
    """
    rotated: Tensor = _RotateResidualGradient.apply(x, quantized.detach(), indices, codebooks.detach())
    return rotated
