"""The straight-through estimator (Bengio et al., 2013, arXiv:1308.3432), with the value exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(soft: Tensor, hard: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept: the gradient passes as it is."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`hard` bit for bit, with the gradient of `soft`; the usual soft + (hard - soft).detach() rounds twice.

    Args:
        soft: (...), differentiable.
        hard: (...), the same shape and dtype; no gradient goes to it.

    Returns:
        (...), exactly `hard`.
    """
    passed: Tensor = _StraightThrough.apply(soft, hard.detach())
    return passed
