"""Rows and codes to measure with: what is kind to screening, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, int, int]  # N rows, K codes, D dimensions


def _gaussian(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x, codes


def _power_law(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The standard deviation of dimension i is 1 / i, much as the principal components of trained encoders decay."""
    spectrum = torch.arange(1, x.shape[1] + 1) ** -1.0
    return x * spectrum, codes * spectrum


def _offset(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x + 10, codes + 10


def _normalised(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(codes, dim=1)


def _fresh(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from U(-1/K, 1/K), as most VQ-VAEs begin."""
    k = codes.shape[0]
    return x, torch.empty_like(codes).uniform_(-1 / k, 1 / k, generator=torch.Generator().manual_seed(1))


def _outlier(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """One dimension fifty times as large as the others."""
    scale = torch.ones(x.shape[1])
    scale[x.shape[1] // 2] = 50
    return x * scale, codes * scale


def _collapsed(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """All codes within a thousandth of one point: no two alike, and hardly any tells from another."""
    return x, codes[:1] + 1e-3 * codes


FAMILIES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "gaussian": _gaussian,
    "power law": _power_law,
    "offset": _offset,
    "normalised": _normalised,
    "fresh codebook": _fresh,
    "outlier dimension": _outlier,
    "collapsed codes": _collapsed,
}


def draw(shape: Shape, family: str = "gaussian") -> tuple[Tensor, Tensor]:
    """x (N, D) and codebook (K, D), float32, the same at every call."""
    n, k, d = shape
    generator = torch.Generator().manual_seed(0)
    return FAMILIES[family](torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator))
