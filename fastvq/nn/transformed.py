"""Codebooks that differ from token to token (QINCo: Huijben et al., 2024, arXiv:2401.14732)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.nn.cosine import l2norm

TransformFn = Callable[[Tensor], Tensor]
_EPS = 1e-6  # added to each difference, as `torch.nn.functional.pairwise_distance` does


class TransformedCodes:
    """The codebooks (H, G, P, K, D) that `transform` makes of codes (H, K, D) for rows (H, G, P, D), and their logits.

    These the caller makes, so here, and only here, there are N x K logits: minus the distance, or the dot product.

    Raises:
        ValueError: `transform` returns another shape.
    """

    def __init__(self, transform: TransformFn, codes: Tensor, rows: Tensor, *, cosine: bool) -> None:
        books = transform(codes)
        wanted = (*rows.shape[:-1], *codes.shape[1:])
        if tuple(books.shape) != wanted:
            raise ValueError(f"codebook_transform_fn must return shape {wanted}; got {tuple(books.shape)}")
        self.books = l2norm(books) if cosine else books
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).unsqueeze(-2)
        self.logits = (
            torch.linalg.vecdot(rows, self.books.to(rows.dtype))
            if cosine
            else (rows - self.books + _EPS).norm(dim=-1).neg()
        )

    def choose(self, k: int, temperature: float) -> Tensor:
        """The k codes with the highest logits, or drawn where temperature is above 0: (H, G, P, k)."""
        logits = self.logits.detach()
        if temperature > 0:
            logits = logits / temperature - torch.empty_like(logits).exponential_().log_()
        return logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k, dim=-1).indices

    def values(self, indices: Tensor) -> Tensor:
        """The codes at indices (H, G, P, k): (H, G, P, k, D)."""
        return self.books.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, self.books.shape[-1]))

    def mean_code(self, temperature: float) -> Tensor:
        """sum_k softmax_k(logit / temperature) c_k, (H, G, P, D), with gradients by way of the chances alone."""
        chances = (self.logits / temperature).softmax(-1)
        return torch.einsum("...k,...kd->...d", chances, self.books.detach().to(chances.dtype))
