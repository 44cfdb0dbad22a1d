"""Operators that a backend may leave out, in plain PyTorch on any device: O(N D) and a few passes, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.backends.reference import working_dtype
from fastvq.backends.rows import finite_rows

EPS = 1e-6  # the smallest norm divided by, that of vector-quantize-pytorch


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _turn(x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """R' g for rows x and their codes q; see `fastvq.nn.rotation.rotate_gradient`."""
    x_norm = x.norm(dim=-1, keepdim=True).clamp(min=EPS)
    q_norm = q.norm(dim=-1, keepdim=True)
    scale = q_norm / x_norm
    q_norm = q_norm.clamp(min=EPS)
    # w = h / |h|: three vectors, each times one number a row. h by itself, since it vanishes as x turns from q.
    h = (x / x_norm).add_(q / q_norm)
    along_h = _dot(h, g) / h.norm(dim=-1, keepdim=True).clamp(min=EPS).square()
    turned = (g * scale).addcmul_(h, -2 * scale * along_h)
    return turned.addcmul_(x, 2 * scale * _dot(q, g) / (q_norm * x_norm))


def rotate_back(gradient: Tensor, x: Tensor, codes: Tensor, indices: Tensor | None) -> Tensor:
    """The gradient (..., D) turned from the codes back to the rows, summed over the stages, in the dtype of x."""
    dtype = working_dtype(x, codes)
    residual, g, codes = x.to(dtype), gradient.to(dtype), codes.to(dtype)
    if indices is None:
        return _turn(residual, codes, g).to(x.dtype)
    total = torch.zeros_like(g)
    for book, index in zip(codes, indices.unbind(-1), strict=True):
        q = book[index]
        total += _turn(residual, q, g)
        residual = residual - q
    return total.to(x.dtype)


def finite_code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """`code_sums` of the rows that are finite, whatever the mask."""
    kept = finite_rows(x, mask)
    found: tuple[Tensor, Tensor] = torch.ops.fastvq.code_sums(x, indices, codebook_size, kept, per_head, None)
    return found


def ema_step_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_avg: Tensor,
    counts: Tensor,
    x: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    decay: float,
    eps: float,
) -> None:
    """`finite_code_sums` of the rows, with the counts into `counts`, and `ema_update_` with both."""
    found, sums = torch.ops.fastvq.finite_code_sums(x, indices, codebook.shape[-2], mask, codebook.dim() == 3, None)
    counts.copy_(found)
    torch.ops.fastvq.ema_update_(codebook, cluster_size, embed_avg, found, sums, decay, eps, None)


def residual_code_sums(x: Tensor, codebooks: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (Q, K) and sums (Q, K, D) of the residuals of each stage; rows that are not finite are left out."""
    residual = x.to(working_dtype(x, codebooks))
    found = []
    for book, index in zip(codebooks, indices.unbind(-1), strict=True):
        kept = residual.isfinite().all(-1)
        found.append(torch.ops.fastvq.code_sums(residual, index, book.shape[0], kept, False, None))
        residual = residual - book[index].to(residual.dtype)
    counts, sums = zip(*found, strict=True)
    return torch.stack(counts), torch.stack(sums)
