"""Unit vectors, for codebooks that are searched by cosine."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

EPS = 1e-6  # the smallest norm divided by, that of vector-quantize-pytorch


def l2norm(x: Tensor) -> Tensor:
    """x (..., D) over its norm, or over 1e-6 where that is larger; the dtype of x."""
    return functional.normalize(x, dim=-1, eps=EPS)
