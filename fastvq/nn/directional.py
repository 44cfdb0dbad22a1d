"""Directional reparameterisation (DiVeQ: openreview.net/forum?id=KRVnpTbx7R): the output is x, moved to its code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvq.nn.cosine import l2norm


def directional_reparam(x: Tensor, codes: Tensor, variance: float) -> Tensor:
    """x moved by its distance to its code, in nearly the direction of that code.

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
