"""What clients do round a search, in their own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fastvq.functional import search


def nearest_direction(rows: Tensor, codebook: Tensor) -> Tensor:
    """Indices (...) of the codes (K, D) nearest to rows (..., D), both normalised first (arXiv:2110.04627)."""
    return cast(Tensor, search(functional.normalize(rows, dim=-1), functional.normalize(codebook, dim=-1)))


def quantized_image(
    tokens: Tensor, codebook: Tensor, look_up: Callable[[Tensor], Tensor], weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise as the quantisers that descend from VQGAN do (arXiv:2012.09841).

    Args:
        tokens: (B, H, W, C).
        codebook: (K, C), as it is compared.
        look_up: gives the codes (N, C) of indices (N,).
        weights: of the commitment loss and of the codebook's.

    Returns:
        (B, C, H, W), off the codes by the rounding of tokens + (codes - tokens), as there; the loss;
        indices (B * H * W,).
    """
    indices = cast(Tensor, search(tokens, codebook)).flatten()
    codes = look_up(indices).view(tokens.shape)
    commitment, learning = weights
    loss = commitment * torch.mean((codes.detach() - tokens) ** 2)
    loss = loss + learning * torch.mean((codes - tokens.detach()) ** 2)
    quantized = tokens + (codes - tokens).detach()
    return quantized.permute(0, 3, 1, 2).contiguous(), loss, indices
