"""k-means (Lloyd, 1982): the first codebook, from the first batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvq.functional import code_sums, search
from fastvq.nn.cosine import l2norm
from fastvq.nn.distributed import all_reduce_, take_turns
from fastvq.nn.sampling import random_order, take_rows


def _first_means(rows: Tensor, codebook_size: int, mask: Tensor | None, shared: bool) -> Tensor:
    """Random rows, each once before any comes twice; zero where there is none."""
    row_mask = None if mask is None else mask.flatten(1)
    shape = (rows.shape[0], rows.shape[1] * rows.shape[2])
    order, available = random_order(shape, row_mask, rows.device)
    numbers = order.gather(1, torch.arange(codebook_size, device=rows.device) % available.clamp(min=1))
    served = (available > 0).expand_as(numbers)
    drawn = take_rows(rows, numbers).masked_fill(~served.unsqueeze(-1), 0.0)
    return take_turns(drawn, served, shared=shared)[0]


def kmeans(
    rows: Tensor, codebook_size: int, iterations: int, *, metric: str, mask: Tensor | None, shared: bool = True
) -> tuple[Tensor, Tensor]:
    """The means of the rows nearest to each mean, taken again and again, from random rows on.

    A mean that no row is nearest to stays where it is.

    Args:
        rows: (H, B, T, D), at least one row; unit vectors when the metric is "cosine".
        codebook_size: K.
        iterations: how often; 0 leaves the random rows.
        metric: "euclidean" or "cosine" (spherical k-means: the means are unit vectors).
        mask: (H, B, T) bool; rows where it is False take no part.
        shared: whether the processes of a data-parallel job sum over all their rows, or each over its own.

    Returns:
        means (H, K, D) and counts (H, K), the rows nearest to each mean in the last iteration (1 without any);
        float32, or float64 for float64 rows.
    """
    means = _first_means(rows, codebook_size, mask, shared)
    means = means.to(torch.promote_types(rows.dtype, torch.float32))
    counts = means.new_ones(means.shape[:2])
    for _ in range(iterations):
        indices = search(rows, means, metric=metric)
        assert isinstance(indices, Tensor)
        counts, sums = code_sums(rows, indices, codebook_size, mask=mask, per_head=True)
        counts, sums = all_reduce_(counts, shared=shared), all_reduce_(sums, shared=shared)
        centres = sums / counts.clamp(min=1).unsqueeze(-1)
        if metric == "cosine":
            centres = l2norm(centres)
        means = torch.where(counts.unsqueeze(-1) > 0, centres, means)
    return means, counts
