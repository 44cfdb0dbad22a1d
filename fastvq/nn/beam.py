"""Beam search over the stages of a residual quantiser: the best sequences of codes so far, not the best code alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _take(values: Tensor, beams: Tensor) -> Tensor:
    """Values (B, N, J, ...) at beams (B, N, j): (B, N, j, ...)."""
    index = beams.reshape(*beams.shape, *[1] * (values.dim() - 3)).expand(*beams.shape, *values.shape[3:])
    return values.gather(2, index)


@dataclass
class Beams:
    """J hypotheses for each of B x N tokens, after some stages l.

    Args:
        residual: (B, N, J, D), what they have left.
        total: (B, N, J, D), the sums of their codes.
        scores: (B, N, J), minus the weighted losses of their codes; the highest is best.
        indices: (B, N, J, l).
        losses: (B, N, J, l).
        inputs: (B, N, J, l, D), what each of their stages quantised, without gradient.
    """

    residual: Tensor
    total: Tensor
    scores: Tensor
    indices: Tensor
    losses: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> Beams:
        """One hypothesis without a stage, for tokens (B, N, D)."""
        start = tokens.unsqueeze(2)
        none = start[..., :0]
        inputs = start.detach().unsqueeze(3)[:, :, :, :0]
        return cls(start, torch.zeros_like(start), start.new_zeros(start.shape[:3]), none.long(), none, inputs)

    def grown(self, quantized: Tensor, passed: Tensor, indices: Tensor, losses: Tensor, weight: Tensor) -> Beams:
        """Every hypothesis followed by each of its k codes: J * k of them.

        Args:
            quantized: (B, N * J, k, D), with their gradient to the output.
            passed: the same values, with their gradient to the next residual.
            indices: (B, N * J, k).
            losses: (B, N * J, k).
            weight: (), of the losses in the scores.
        """
        k = indices.shape[-1]
        split = (*self.scores.shape, k)

        def before(values: Tensor) -> Tensor:
            return values.unsqueeze(3).expand(*split, *values.shape[3:])

        def followed(values: Tensor, last: Tensor) -> Tensor:
            return torch.cat([before(values), last.reshape(*split, 1)], -1).flatten(2, 3)

        inputs = torch.cat([self.inputs, self.residual.detach().unsqueeze(3)], 3)
        return Beams(
            (self.residual.unsqueeze(3) - passed.reshape(*split, passed.shape[-1])).flatten(2, 3),
            (self.total.unsqueeze(3) + quantized.reshape(*split, passed.shape[-1])).flatten(2, 3),
            (self.scores.unsqueeze(3) - losses.detach().reshape(split) * weight).flatten(2, 3),
            followed(self.indices, indices),
            followed(self.losses, losses.to(self.losses.dtype)),
            before(inputs).flatten(2, 3),
        )

    def best(self, size: int) -> Beams:
        """The `size` with the highest scores, or all when there are no more."""
        if self.scores.shape[2] <= size:
            return self
        scores, beams = self.scores.topk(size, dim=2)
        return Beams(
            residual=_take(self.residual, beams),
            total=_take(self.total, beams),
            scores=scores,
            indices=_take(self.indices, beams),
            losses=_take(self.losses, beams),
            inputs=_take(self.inputs, beams),
        )
