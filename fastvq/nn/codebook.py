"""A codebook and what it remembers between steps: where it came from, how it moves, which codes are dead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.functional import code_sums, ema_update_
from fastvq.nn.cosine import l2norm
from fastvq.nn.distributed import all_reduce_, take_turns
from fastvq.nn.kmeans import kmeans
from fastvq.nn.recompute import recomputing
from fastvq.nn.sampling import rows_for_codes


class Codebook(nn.Module):
    """H codebooks of K codes of D numbers, with the state of their exponential moving averages.

    The state_dict is that of vector-quantize-pytorch: initted () bool, cluster_size (H, K), embed_avg (H, K, D) and
    embed (H, K, D), which is a parameter when `learnable`. It stays in float32 when the module is cast to a narrower
    dtype, since moving averages stall there; a parameter is cast.

    Args:
        dim: D.
        codebook_size: K.
        num_codebooks: H.
        kmeans_init: start from the k-means of the first batch.
        kmeans_iters: its iterations.
        decay: of the moving averages.
        eps: of the Laplace smoothing.
        threshold: codes whose cluster_size is below it are dead, and replaced by rows of the batch; 0 keeps them.
        metric: "euclidean" or "cosine".
        learnable: the codes are a parameter.
        ema_update: the codes follow their moving averages.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int,
        kmeans_init: bool,
        kmeans_iters: int,
        decay: float,
        eps: float,
        threshold: float,
        metric: str,
        learnable: bool,
        ema_update: bool,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.kmeans_iters = kmeans_iters
        self.decay = decay
        self.eps = eps
        self.threshold = threshold
        self.metric = metric
        self.learnable = learnable
        self.ema_update = ema_update

        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = self._on_manifold(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self._ready = not kmeans_init  # `initted` for Python, so that no forward waits for the device to ask
        self._forward_codes: Tensor | None = None

    def codes(self, *, changing: bool) -> Tensor:
        """The codes of this forward, (H, K, D); apart from `embed` when the step will write that before backward."""
        if recomputing() and self._forward_codes is not None:
            return self._forward_codes
        codes = self.embed.clone() if changing else self.embed
        if not self.learnable and not torch.compiler.is_compiling():
            self._forward_codes = codes
        return codes

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes at indices (H, ...): (H, ..., D), zero where the index is -1; differentiable to the codes."""
        heads = torch.arange(indices.shape[0], device=indices.device).view(-1, *[1] * (indices.dim() - 1))
        codes = self.embed[heads, indices.clamp(min=0)]
        return codes.masked_fill((indices < 0).unsqueeze(-1), 0.0)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Put codes (H, K, D) in place, with the averages that give them back at the next update."""
        self.embed.copy_(self._on_manifold(codes.to(self.embed)))
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        self.embed_avg.copy_(self.embed * smoothed.unsqueeze(-1))
        self.initted.fill_(True)
        self._ready = True

    @torch.no_grad()
    def init_from(self, rows: Tensor, mask: Tensor | None) -> None:
        """Before the first batch with rows (H, B, T, D), mask (H, B, T): their k-means, where that was asked for."""
        if self._ready or rows.numel() == 0:
            return
        found = rows.shape[1] * rows.shape[2]
        if found < self.codebook_size:
            warnings.warn(
                f"k-means starts {self.codebook_size} codes from {found} rows: some codes will be equal",
                RuntimeWarning,
                stacklevel=2,
            )
        means, counts = kmeans(rows, self.codebook_size, self.kmeans_iters, metric=self.metric, mask=mask)
        # A batch that is masked throughout has no counts; sizes of 1 are those of a new codebook.
        self.cluster_size.copy_(torch.where(counts.sum(-1, keepdim=True) > 0, counts, 1.0))
        self.set_codes(means)

    @property
    def tracks(self) -> bool:
        """Whether a training step writes the state."""
        return self.ema_update or self.threshold > 0

    @torch.no_grad()
    def update(self, rows: Tensor, indices: Tensor, mask: Tensor | None) -> None:
        """Learn from rows (H, B, T, D), their indices (H, B, T) and mask: move the averages, replace dead codes."""
        self._move_averages(rows, indices, mask)
        if self.threshold > 0 and rows.numel() > 0:
            self._replace_dead_codes(rows, mask)

    def _move_averages(self, rows: Tensor, indices: Tensor, mask: Tensor | None) -> None:
        counts, sums = code_sums(rows, indices, self.codebook_size, mask=mask, per_head=True)
        ema_update_(
            self.embed if self.ema_update else torch.empty_like(self.embed),
            self.cluster_size,
            self.embed_avg,
            all_reduce_(counts),
            all_reduce_(sums),
            decay=self.decay,
            eps=self.eps,
        )
        if self.ema_update and self.metric == "cosine":
            self.embed.copy_(l2norm(self.embed))

    def _replace_dead_codes(self, rows: Tensor, mask: Tensor | None) -> None:
        """Codes in too little use start again as rows of the batch, each with a cluster_size of the threshold."""
        drawn, served = rows_for_codes(rows, self.cluster_size < self.threshold, mask)
        drawn, served = take_turns(drawn.to(self.embed), served)
        chosen = served.unsqueeze(-1)
        drawn.masked_fill_(~chosen, 0.0)
        self.cluster_size.masked_fill_(served, self.threshold)
        self.embed.masked_fill_(chosen, 0.0).add_(drawn)
        self.embed_avg.masked_fill_(chosen, 0.0).add_(drawn, alpha=self.threshold)

    def _on_manifold(self, codes: Tensor) -> Tensor:
        return l2norm(codes) if self.metric == "cosine" else codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def not_below_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        super()._apply(fn if self.learnable else not_below_float32, recurse)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if not self.initted.is_meta:
            self._ready = bool(self.initted)
