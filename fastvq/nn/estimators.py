"""How a gradient passes the choice of a code, which has none of its own; the rotation trick is in `rotation`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvq.nn.cosine import l2norm


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.source_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.source_dtype), None


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """`value`, exactly; its gradient goes to `source`, of the same shape, as it is (Bengio et al., 2013)."""
    passed: Tensor = _StraightThrough.apply(source, value.detach())
    return passed


def directional_reparam(x: Tensor, codes: Tensor, variance: float) -> Tensor:
    """x moved by its distance to its code, in nearly the code's direction (DiVeQ: openreview.net/forum?id=KRVnpTbx7R).

    Args:
        x: (..., D).
        codes: (..., D), the code of each row.
        variance: of the normal noise added to the difference before its direction is taken.

    Returns:
        (..., D), with gradients to x and to the codes, by way of the distance.
    """
    difference = codes - x
    noisy = difference.detach() + math.sqrt(variance) * torch.randn_like(difference)
    return x + l2norm(noisy) * difference.norm(dim=-1, keepdim=True)
