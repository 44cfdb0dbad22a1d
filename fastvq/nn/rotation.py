"""The rotation trick (Fifty et al., 2024, arXiv:2410.06424): a gradient that turns as x turns to its code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6  # the smallest norm divided by, that of vector-quantize-pytorch
_PIECE = 1 << 18  # elements of a tensor that are turned at once on the CPU


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, of one shape (..., D), cut alike into rows that stay in cache, where they lie."""
    shape = tensors[0].shape[:-1]
    if tensors[0].numel() <= _PIECE or max(shape, default=1) == 1:
        yield tensors
        return
    for parts in zip(*(t.tensor_split(2, shape.index(max(shape))) for t in tensors), strict=True):
        yield from _pieces(*parts)


def _turn(x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """R' g for rows x and their codes q; see `rotate_gradient`."""
    x_norm = x.norm(dim=-1, keepdim=True).clamp(min=EPS)
    q_norm = q.norm(dim=-1, keepdim=True)
    scale = q_norm / x_norm
    q_norm = q_norm.clamp(min=EPS)
    # w = h / |h|: three vectors, each times one number a row. h by itself, since it vanishes as x turns from q.
    h = (x / x_norm).add_(q / q_norm)
    along_h = _dot(h, g) / h.norm(dim=-1, keepdim=True).clamp(min=EPS).square()
    turned = (g * scale).addcmul_(h, -2 * scale * along_h)
    return turned.addcmul_(x, 2 * scale * _dot(q, g) / (q_norm * x_norm))


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
        work = torch.promote_types(x.dtype, torch.float32)
        if torch.compiler.is_compiling() or grad.device.type != "cpu":
            return None, _turn(x.to(work), quantized.to(work), grad.to(work)).to(grad.dtype)
        turned = torch.empty_like(quantized)
        for x_part, q_part, g_part, out in _pieces(x, quantized, grad, turned):
            out.copy_(_turn(x_part.to(work), q_part.to(work), g_part.to(work)))
        return None, turned


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


def _turn_through_stages(x: Tensor, g: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    total, residual = torch.zeros_like(g), x
    for codes, index in zip(codebooks, indices.unbind(-1), strict=True):
        q = codes[index]
        total += _turn(residual, q, g)
        residual = residual - q
    return total


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
        rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
        whole = torch.compiler.is_compiling() or grad.device.type != "cpu"
        pieces = 1 if whole else -(-grad.numel() // _PIECE) or 1
        parts = zip(*(t.tensor_split(pieces) for t in rows), strict=True)
        turned = [_turn_through_stages(part, g, index, codebooks) for part, g, index in parts]
        return torch.cat(turned).view(x.shape), None, None, None


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
    codes = codebooks.detach().to(x.dtype)
    rotated: Tensor = _RotateResidualGradient.apply(x, quantized.detach(), indices, codes)
    return rotated
