"""The losses of the layer, on rows and codes of its heads; none of them holds an N x K or a K x K matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastvq import streaming
from fastvq.backends.reference import working_dtype
from fastvq.nn.cosine import l2norm
from fastvq.nn.sampling import random_order


class LossBreakdown(NamedTuple):
    """The parts of the training loss before their weights, each (); zero where a part is not asked for."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of values (...) where the mask (...) is True, 0 without any; (), float32 or float64."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def commitment(rows: Tensor, codes: Tensor) -> Tensor:
    """mean over D of (row - code)^2, (...), for rows and their codes (..., D); float32 or float64."""
    work = torch.promote_types(torch.promote_types(rows.dtype, codes.dtype), torch.float32)
    return (rows.to(work) - codes.to(work)).square().mean(-1)


def cross_entropy(rows: Tensor, codes: Tensor, indices: Tensor, mask: Tensor | None, *, metric: str) -> Tensor:
    """The mean of -log softmax_k(logit) at the code of each row, over rows with one.

    The logit is minus the distance, or the dot product, as in `fastvq.streaming`.

    Args:
        rows: (H, B, T, D).
        codes: (H, K, D).
        indices: (H, B, T), -1 for none.
        mask: (H, B, T) bool, or None for all.
        metric: "euclidean" or "cosine".
    """
    targets = indices if mask is None else indices.masked_fill(~mask, -1)
    losses = streaming.cross_entropy(rows.flatten(1, 2), codes, targets.flatten(1), metric=metric)
    return losses.sum() / (targets >= 0).sum().clamp(min=1)


def diversity(rows: Tensor, codes: Tensor, mask: Tensor | None, *, temperature: float, metric: str) -> Tensor:
    """Minus the entropy of the mean chance of each code, the mean over heads and batch, at each place of the sequence.

    Chances are softmax_k(temperature * logit), as vector-quantize-pytorch has them; the result is the mean over the
    places that have a row.

    Args:
        rows: (H, G, P, D): G rows at each of P places.
        codes: (H, K, D).
        mask: (H, G, P) bool, or None for all.
        temperature: factor of the logits.
        metric: "euclidean" or "cosine".
    """
    dtype = working_dtype(rows, codes)
    kept = rows.new_ones(rows.shape[:-1], dtype=dtype) if mask is None else mask.to(dtype)
    many = kept.sum((0, 1))
    entropy = streaming.mean_choice_entropy(rows, codes, kept / many.clamp(min=1), metric=metric, scale=temperature)
    return -entropy.sum() / (many > 0).sum().clamp(min=1)


def dense_cross_entropy(logits: Tensor, indices: Tensor, mask: Tensor | None) -> Tensor:
    """`cross_entropy` from logits (H, B, T, K) that are there already."""
    targets = indices if mask is None else indices.masked_fill(~mask, -1)
    total = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


def dense_diversity(logits: Tensor, mask: Tensor | None, *, temperature: float) -> Tensor:
    """`diversity` from logits (H, G, P, K) that are there already."""
    kept = logits.new_ones(logits.shape[:-1]) if mask is None else mask.to(logits.dtype)
    many = kept.sum((0, 1))
    chances = (logits * temperature).softmax(-1) * kept.unsqueeze(-1)
    mean = chances.sum((0, 1)) / many.clamp(min=1).unsqueeze(-1)
    entropy = -(mean * mean.clamp(min=streaming.MIN_PROBABILITY).log()).sum(-1)
    return -(entropy * (many > 0)).sum() / (many > 0).sum().clamp(min=1)


def orthogonal(codes: Tensor, active: Tensor | None, most: int | None) -> Tensor:
    """How far codes are from orthogonal: sum of cos^2 of all pairs / (H K^2) - 1 / K (arXiv:2112.00384, equation 2).

    The sum of the squares of all K x K cosines is that of the D x D products of their dimensions, so neither matrix
    is larger than the codes.

    Args:
        codes: (H, K, D), with gradients.
        active: (H, K) bool, the codes to count, or None for all.
        most: count a random part of this many; None counts all.
    """
    heads, many, dim = codes.shape
    if most is not None and most < many:
        order, available = random_order((1, many), None if active is None else active[:1], codes.device)
        codes = codes[:, order[0, :most]]
        active = None if active is None else (torch.arange(most, device=codes.device) < available).expand(heads, -1)
        many = most
    unit = l2norm(codes)
    count = unit.new_full((heads,), many) if active is None else active.sum(-1).to(unit.dtype)
    if active is not None:
        unit = unit * active.unsqueeze(-1)
    gram = unit.transpose(1, 2) @ unit if dim < many else unit @ unit.transpose(1, 2)
    count = count.clamp(min=1)
    return (gram.square().sum((1, 2)) / count.square() - 1 / count).mean()
