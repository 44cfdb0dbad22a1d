"""How good the images are and how well the codebook is used."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in decibels, 10 log10(1 / mse), for images in [0, 1]."""
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)


def mean_squared_error(first: Tensor, second: Tensor) -> float:
    """Of two uint8 images of one shape, in squared units of the [0, 1] range."""
    return float((first.double() - second.double()).div(255.0).square().mean())


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs in `indices`, any shape: (K,) int64."""
    return torch.bincount(indices.flatten(), minlength=codebook_size)


@dataclass(frozen=True)
class CodebookUse:
    """How a codebook of K codes is used.

    Attributes:
        perplexity: exp of the entropy of the codes; K when all are used alike, 1 when one serves for everything.
        usage: share of the codes that occur at all, from 0 to 1.
        dead: codes that never occur.
    """

    perplexity: float
    usage: float
    dead: int

    @classmethod
    def of(cls, counts: Tensor) -> CodebookUse:
        """From the counts (K,) of the codes; with nothing counted the perplexity is 1."""
        used = counts[counts > 0].double()
        shares = used / used.sum()
        dead = counts.numel() - used.numel()
        return cls(
            perplexity=float(torch.exp(-(shares * shares.log()).sum())),
            usage=used.numel() / counts.numel(),
            dead=dead,
        )
