"""A codebook that follows the mean and spread of the rows (Huh et al., 2023, "Straightening out the straight-through
estimator", section 4.2): its codes are whitened by their own statistics and coloured by those of the batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvq.backends.rows import finite_rows
from fastvq.nn.codebook import Codebook
from fastvq.nn.distributed import all_reduce_

_LEAST_VARIANCE = 1e-5  # that of vector-quantize-pytorch
_BATCH = ("batch_mean", "batch_variance")


class AffineCodebook(Codebook):
    """A `Codebook` whose codes are used as (embed - codebook_mean) * (batch_std / codebook_std) + batch_mean.

    The four statistics, each (H, 1, D), are moving averages of every training forward. As in vector-quantize-pytorch
    those of the batches enter the state_dict with the first of them; before it codes are used as they are.

    Args:
        sync_affine_param: the statistics of the batches are those of all processes of a data-parallel job.
        affine_param_batch_decay: of the statistics of the batches.
        affine_param_codebook_decay: of the statistics of the codes.
        options: those of `Codebook`.
    """

    batch_mean: Tensor
    batch_variance: Tensor
    codebook_mean_needs_init: Tensor
    codebook_mean: Tensor
    codebook_variance_needs_init: Tensor
    codebook_variance: Tensor

    def __init__(
        self,
        *arguments: Any,
        sync_affine_param: bool,
        affine_param_batch_decay: float,
        affine_param_codebook_decay: float,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.affine_param = True
        self.sync_affine_param = sync_affine_param
        self.affine_param_batch_decay = affine_param_batch_decay
        self.affine_param_codebook_decay = affine_param_codebook_decay
        shape = (self.num_codebooks, 1, self.embed.shape[-1])
        self.register_buffer("batch_mean", torch.zeros(shape))
        self.register_buffer("batch_variance", torch.ones(shape))
        for name, first in (("codebook_mean", torch.zeros(shape)), ("codebook_variance", torch.ones(shape))):
            self.register_buffer(f"{name}_needs_init", torch.tensor(True))
            self.register_buffer(name, first)
        self._has_batch = False  # whether a batch has been seen, for Python: no forward waits for the device to ask

    def as_used(self, embed: Tensor) -> Tensor:
        """Codes (H, K, D) as they are searched and returned."""
        codes = super().as_used(embed)
        if not self._has_batch:
            return codes
        return (codes - self.codebook_mean) * self._spread() + self.batch_mean

    def of_codes(self, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Counts and sums of rows, as those of the rows in the frame of `embed`."""
        if not self._has_batch:
            return counts, sums
        many = counts.unsqueeze(-1)
        return counts, (sums - many * self.batch_mean) / self._spread() + many * self.codebook_mean

    def _learns_alone(self) -> bool:
        return not self._has_batch and super()._learns_alone()

    def row_of_codes(self, rows: Tensor) -> Tensor:
        """Rows (H, K, D) in the frame of `embed`."""
        if not self._has_batch or self.strict_compat:
            return rows
        return (rows - self.batch_mean) / self._spread() + self.codebook_mean

    def _spread(self) -> Tensor:
        """batch_std / codebook_std, (H, 1, D)."""
        batch, codes = (v.clamp(min=_LEAST_VARIANCE) for v in (self.batch_variance, self.codebook_variance))
        return batch.sqrt() / codes.sqrt()

    @torch.no_grad()
    def observe(self, rows: Tensor, mask: Tensor | None) -> None:
        """Move the statistics to those of the codes and of the rows (H, B, T, D) of a training forward."""
        if not self.training and not self.strict_compat:
            return
        if self.training:
            decay = self.affine_param_codebook_decay
            mean = self.embed.mean(1, keepdim=True)
            variance = self.embed.var(1, keepdim=True, correction=0)
            for name, new in (("codebook_mean", mean), ("codebook_variance", variance)):
                first, old = getattr(self, f"{name}_needs_init"), getattr(self, name)
                old.copy_(torch.where(first, new, old * decay + new * (1 - decay)))
                first.fill_(False)
        self._observe_batch(rows, finite_rows(rows, mask))

    def _observe_batch(self, rows: Tensor, mask: Tensor) -> None:
        weights = mask.flatten(1).unsqueeze(-1).to(self.batch_mean.dtype)  # (H, N, 1)
        rows = torch.where(mask.unsqueeze(-1), rows, 0.0).flatten(1, 2).to(weights.dtype)
        many = all_reduce_(weights.sum(1, keepdim=True), shared=self.sync_affine_param)
        seen = many > 0
        many = many.clamp(min=1)
        mean = all_reduce_(rows.sum(1, keepdim=True), shared=self.sync_affine_param) / many
        squares = ((rows - mean).square_() * weights).sum(1, keepdim=True)
        variance = all_reduce_(squares, shared=self.sync_affine_param) / many
        decay = self.affine_param_batch_decay if self._has_batch else 0.0
        for name, new in zip(_BATCH, (mean, variance), strict=True):
            old = getattr(self, name)
            old.copy_(torch.where(seen, old * decay + new * (1 - decay), old))
        self._has_batch = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._has_batch:
            for name in _BATCH:
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        known = prefix + _BATCH[0] in state_dict
        if not known:  # from before the first batch: nothing is missing
            state_dict = state_dict | {prefix + name: getattr(self, name) for name in _BATCH}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._has_batch = known
