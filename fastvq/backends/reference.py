"""The specification: every operator in plain PyTorch and float64, slow and obviously right.

The canonical nearest code of a row ``x`` is the smallest ``k`` that attains ``min_k d_k``, where ``d_k`` is the sum
over ``i = 0 .. D-1``, in that order, of ``t * t`` with ``t = x_i - c_ki``: float64, each operation rounded on its own.
For "cosine" and "dot" it is the smallest ``k`` that attains the maximum of the sum of ``x_i * c_ki``. A NaN distance
counts as +infinity, a NaN score as -infinity. Every other backend returns exactly these indices.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 16  # elements of one block of distances: small enough to stay in cache, and never N x K


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of distances, losses and sums: float64 if any input is float64, else float32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def _rows(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """x as (H, N, D) and codebook as (H, K, D); H = 1 when there is one codebook for all rows."""
    if codebook.dim() == 2:
        return x.reshape(1, -1, x.shape[-1]), codebook.unsqueeze(0)
    return x.reshape(x.shape[0], -1, x.shape[-1]), codebook


def _scores(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """What is minimised, (n, K): squared distances, or minus the dot products; float64 in, terms added in order."""
    columns = codes.t().contiguous()
    total = x.new_zeros(x.shape[0], codes.shape[0])
    for i in range(x.shape[1]):
        if metric == "euclidean":
            term = x[:, i : i + 1] - columns[i]
            term = term * term
        else:
            term = x[:, i : i + 1] * columns[i]
        total += term
    return total if metric == "euclidean" else -total


def _search_head(x: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    x, codes = x.double(), codes.double()
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    best = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    step = max(1, _CHUNK // codes.shape[0])
    for start in range(0, x.shape[0], step):
        scores = _scores(x[start : start + step], codes, metric)
        nearest = torch.where(scores.isnan(), torch.inf, scores).argmin(dim=1)
        indices[start : start + step] = nearest
        best[start : start + step] = scores.gather(1, nearest.unsqueeze(1)).squeeze(1)
    return indices, best if metric == "euclidean" else -best


def search(x: Tensor, codebook: Tensor, metric: str, return_distance: bool, precision: str) -> tuple[Tensor, Tensor]:
    """Indices (...), and squared distances or scores (...) when asked for, else an empty tensor."""
    rows, codes = _rows(x, codebook)
    found = [_search_head(r, c, metric) for r, c in zip(rows, codes, strict=True)]
    indices = torch.stack([i for i, _ in found]).reshape(x.shape[:-1])
    dtype = working_dtype(x, codebook)
    if not return_distance:
        return indices, x.new_empty(0, dtype=dtype)
    return indices, torch.stack([d for _, d in found]).reshape(x.shape[:-1]).to(dtype)


def _gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook (K, D) at indices (...), or codebook (H, K, D) at indices (H, ...): (..., D)."""
    if codebook.dim() == 2:
        return codebook[indices]
    heads = torch.arange(codebook.shape[0], device=codebook.device)
    return codebook[heads.view(-1, *[1] * (indices.dim() - 1)), indices]


def _elements(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many elements the mean of the loss runs over, at least 1, so that no rows give a loss of 0."""
    rows = mask.sum() if mask is not None else torch.tensor(x.shape[:-1].numel(), device=x.device)
    return (rows * x.shape[-1]).clamp(min=1).double()


def _difference(x: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    """x less its code, (..., D) in float64; zero in rows that the mask leaves out."""
    difference = x.double() - _gather(codebook, indices).double()
    return difference if mask is None else torch.where(mask.unsqueeze(-1), difference, 0.0)


def vector_quantize(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D) in the dtype of x, indices (...), and the loss, a scalar."""
    indices, _ = search(x, codebook, metric, False, "exact")
    quantized = _gather(codebook, indices).to(x.dtype)
    mse = _difference(x, codebook, indices, mask).square().sum() / _elements(x, mask)
    loss = (commitment_weight + codebook_weight) * mse
    return quantized, indices, loss.to(working_dtype(x, codebook))


def vector_quantize_counted(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize`, and how many finite rows that the mask keeps took each code: counts ([H,] K), int64."""
    quantized, indices, loss = vector_quantize(x, codebook, metric, commitment_weight, codebook_weight, mask)
    finite = x.isfinite().all(-1)
    kept = finite if mask is None else finite & mask
    column = x[..., :1].double()  # in which a count is exact
    counts, _ = code_sums(column, indices, codebook.shape[-2], kept, codebook.dim() == 3)
    return quantized, indices, loss, counts.long()


def vector_quantize_backward(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and commitment loss) and to the codebook (codebook loss)."""
    difference = _difference(x, codebook, indices, mask) * (2 * grad_loss.double() / _elements(x, mask))
    grad_x, grad_codebook = x.new_empty(0), codebook.new_empty(0)
    if need_x:
        grad_x = (grad_quantized.double() + commitment_weight * difference).to(x.dtype)
    if need_codebook:
        _, sums = code_sums(difference, indices, codebook.shape[-2], None, codebook.dim() == 3)
        grad_codebook = (-codebook_weight * sums).to(codebook.dtype)
    return grad_x, grad_codebook


def code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Counts ([H,] K) and sums ([H,] K, D): float64 sums in row order, rounded once."""
    heads = x.shape[0] if per_head else 1
    rows = x.reshape(heads, -1, x.shape[-1]).double()
    codes = indices.reshape(heads, -1)
    if codes.numel() and codes.max() >= codebook_size:
        raise ValueError(f"indices must be below codebook_size = {codebook_size}; got {int(codes.max())}")
    kept = codes >= 0
    if mask is not None:
        kept = kept & mask.reshape(heads, -1)
    counts = rows.new_zeros(heads, codebook_size)
    sums = rows.new_zeros(heads, codebook_size, x.shape[-1])
    for h in range(heads):
        live = codes[h][kept[h]]
        counts[h] = torch.bincount(live, minlength=codebook_size)
        sums[h].index_add_(0, live, rows[h][kept[h]])
    dtype = working_dtype(x)
    counts, sums = counts.to(dtype), sums.to(dtype)
    return (counts, sums) if per_head else (counts[0], sums[0])


def ema_update_(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    """The moving averages and the codebook, in place; float64 within, each stored tensor rounded once."""
    size = decay * cluster_size.double() + (1 - decay) * counts.double()
    average = decay * embed_avg.double() + (1 - decay) * sums.double()
    cluster_size.copy_(size)
    embed_avg.copy_(average)
    total = size.sum(-1, keepdim=True)
    smoothed = (size + eps) / (total + size.shape[-1] * eps) * total
    codebook.copy_(average / smoothed.unsqueeze(-1))


def _stages(codebooks: Tensor) -> list[Tensor]:
    """The codebook of each stage: (K, D), or (H, K, D) with a codebook a head."""
    return list(codebooks.unbind(-3))


def residual_quantize(x: Tensor, codebooks: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D), indices (..., Q), losses (Q,); residuals rounded once a stage."""
    dtype = working_dtype(x, codebooks)
    residual = x.to(dtype)
    quantized = torch.zeros_like(residual)
    indices, losses = [], []
    for stage, codebook in enumerate(_stages(codebooks)):
        nearest, _ = search(residual, codebook, metric, False, "exact")
        code = _gather(codebook, nearest).to(dtype)
        losses.append(_difference(residual, codebook, nearest, None).square().sum() / _elements(x, None))
        indices.append(nearest)
        residual = residual - code
        quantized = quantized + code if stage else code
    return quantized.to(x.dtype), torch.stack(indices, dim=-1), torch.stack(losses).to(dtype)


def residual_quantize_backward(
    grad_quantized: Tensor,
    grad_losses: Tensor,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and all losses) and to the codebooks (each stage's own loss)."""
    dtype = working_dtype(x, codebooks)
    grad_x = grad_quantized.double()
    grad_codebooks = []
    residual = x.to(dtype)
    for codebook, nearest, grad_loss in zip(
        _stages(codebooks), indices.unbind(-1), grad_losses.double().unbind(0), strict=True
    ):
        difference = _difference(residual, codebook, nearest, None) * (2 * grad_loss / _elements(x, None))
        grad_x = grad_x + difference
        _, sums = code_sums(difference, nearest, codebook.shape[-2], None, codebook.dim() == 3)
        grad_codebooks.append(-sums)
        residual = residual - _gather(codebook, nearest).to(dtype)
    return (
        grad_x.to(x.dtype) if need_x else x.new_empty(0),
        torch.stack(grad_codebooks, dim=-3).to(codebooks.dtype) if need_codebooks else codebooks.new_empty(0),
    )
