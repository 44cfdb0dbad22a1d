"""The layer as everybody writes it: a distance matrix, argmin, a one-hot, matmuls; what ours must agree with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rotate(x: Tensor, q: Tensor) -> Tensor:
    """q with the gradient of the rotation trick, by autograd over the matrix of each row (arXiv:2410.06424)."""
    x_norm, q_norm = x.norm(dim=-1, keepdim=True).clamp(min=1e-6), q.norm(dim=-1, keepdim=True)
    u, p = (x / x_norm).detach(), (q / q_norm.clamp(min=1e-6)).detach()
    w = functional.normalize(u + p, dim=-1, eps=1e-6)
    outer = torch.einsum("...i,...j->...ij", p, u) - torch.einsum("...i,...j->...ij", w, w)
    rotation = torch.eye(x.shape[-1], dtype=x.dtype) + 2 * outer
    return (q_norm / x_norm).detach() * torch.einsum("...ij,...j->...i", rotation, x)


class NaiveVQ:
    """One codebook on rows (N, D), in the dtype of the codes.

    mode "ema": the codes follow the moving averages; "learnable": they are a leaf that the loss trains.
    """

    def __init__(
        self,
        codes: Tensor,
        *,
        mode: str = "ema",
        cosine: bool = False,
        rotation: bool = True,
        decay: float = 0.8,
        weight: float = 1.0,
    ) -> None:
        self.embed = codes.clone().requires_grad_(mode == "learnable")
        self.embed_avg = codes.clone()
        self.cluster_size = torch.ones_like(codes[:, 0])
        self.mode, self.cosine, self.rotation, self.decay, self.weight = mode, cosine, rotation, decay, weight

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
        if self.cosine:
            x = functional.normalize(x, dim=-1, eps=1e-6)
        with torch.no_grad():
            distances = (
                -x @ self.embed.t()
                if self.cosine
                else torch.cdist(x, self.embed, compute_mode="donot_use_mm_for_euclid_dist")
            )
            indices = distances.argmin(1)
            one_hot = functional.one_hot(indices, len(self.embed)).to(x.dtype)
        q = one_hot @ self.embed
        target = q if self.mode == "learnable" else q.detach()
        loss = self.weight * (target - x)[kept].square().mean()
        out = rotate(x, q.detach()) if self.rotation else x + (q - x).detach()
        if self.mode == "ema":
            self._learn(x.detach()[kept], one_hot[kept])
        return out * kept.unsqueeze(1), torch.where(kept, indices, -1), loss

    def _learn(self, x: Tensor, one_hot: Tensor) -> None:
        eps, codes = 1e-5, len(self.embed)
        self.cluster_size = self.decay * self.cluster_size + (1 - self.decay) * one_hot.sum(0)
        self.embed_avg = self.decay * self.embed_avg + (1 - self.decay) * one_hot.t() @ x
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + eps) / (total + codes * eps) * total
        self.embed = self.embed_avg / smoothed.unsqueeze(1)
        if self.cosine:
            self.embed = functional.normalize(self.embed, dim=-1, eps=1e-6)
