"""The loop of a residual quantiser, and the split into groups: what all residual modules share.

SoundStream (Zeghidour et al., 2021, arXiv:2107.03312, algorithm 1): every stage quantises what the stages before it
have left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvq.nn import checks
from fastvq.nn.channels import at_least_float32, autocast_off
from fastvq.nn.stage_dropout import StageDropout


class ResidualStages(nn.Module):
    """Q stages in turn. A class that builds on it makes `layers` and says what one stage does, and its codes are.

    Attributes:
        num_quantizers: Q.
        quantize_dropout: whether training leaves out the last stages at random.
    """

    layers: Any  # an nn.ModuleList, whose items type checkers take for tensors or bare modules

    def _set_stages(self, num_quantizers: int, dropout: bool, cutoff_index: int, multiple_of: int) -> None:
        checks.whole("num_quantizers", num_quantizers, 1)
        checks.whole("quantize_dropout_cutoff_index", cutoff_index, 0)
        self.num_quantizers = num_quantizers
        self.quantize_dropout = dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = cutoff_index
        self.quantize_dropout_multiple_of = multiple_of
        self._dropout = StageDropout(num_quantizers, cutoff_index, multiple_of) if self.quantize_dropout else None

    def _stage(self, number: int, residual: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantise what is left, (N, d): codes with their gradient (N, d), indices (N,), and the loss, if any."""
        raise NotImplementedError

    def _stage_codes(self, indices: Tensor) -> Tensor:
        """The codes (..., Q, d) of indices (..., Q), each from 0 on."""
        raise NotImplementedError

    def _last_stage(self, device: torch.device, seed: int | None) -> int | Tensor | None:
        """The last stage that runs in this step; None when all do."""
        if self._dropout is None or not (self.training and torch.is_grad_enabled()):
            return None
        return self._dropout.last(device, seed)

    def _quantize(
        self, tokens: Tensor, last: int | Tensor | None, **arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All stages up to `last` on tokens (..., d): the sum of their codes, indices (..., Q) and losses (Q,).

        A stage that does not run has the index -1 and the loss 0. The gradient of the sum reaches the tokens through
        every stage, so with straight-through gradients once for each. The residuals are float32 at least.
        """
        with autocast_off(tokens):
            residual = at_least_float32(tokens).reshape(-1, tokens.shape[-1])
            total = torch.zeros_like(residual)
            all_indices: list[Tensor] = []
            losses: list[Tensor] = []
            for number in range(self.num_quantizers):
                if isinstance(last, int) and number > last:
                    all_indices.append(torch.full_like(all_indices[0], -1))
                    losses.extend(torch.zeros_like(loss) for loss in losses[:1])
                    continue
                quantized, indices, loss = self._stage(number, residual, **arguments)
                if isinstance(last, Tensor):
                    runs = number <= last
                    quantized, indices = torch.where(runs, quantized, 0.0), torch.where(runs, indices, -1)
                    loss = None if loss is None else torch.where(runs, loss, 0.0)
                residual = residual - quantized.detach()
                total = total + quantized
                all_indices.append(indices)
                if loss is not None:
                    losses.append(loss)
        shape = (*tokens.shape[:-1], self.num_quantizers)
        indices = torch.stack(all_indices, -1).reshape(shape)
        return total.reshape(tokens.shape).to(tokens.dtype), indices, torch.stack(losses) if losses else None

    def _codes(self, indices: Tensor) -> Tensor:
        """Codes (Q, ..., d) of indices (..., Q or fewer): zero where the index is -1, or missing."""
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        given = indices.shape[-1] if indices.dim() else 0
        if given != self.num_quantizers:
            if given > self.num_quantizers or not self.quantize_dropout:
                fewer = ", or fewer," if self.quantize_dropout else ""
                hint = "" if self.quantize_dropout else "; fewer need quantize_dropout=True"
                raise ValueError(
                    f"indices must have num_quantizers = {self.num_quantizers}{fewer} in the last dimension; "
                    f"got {tuple(indices.shape)}{hint}"
                )
            indices = functional.pad(indices, (0, self.num_quantizers - given), value=-1)
        codes = self._stage_codes(indices.clamp(min=0)).masked_fill((indices < 0).unsqueeze(-1), 0.0)
        return codes.movedim(-2, 0)


class GroupedStages(nn.Module):
    """Groups of channels, each with a residual quantiser of its own.

    Args:
        dim: channels of the input, a multiple of groups.
        groups: how many.
        channels_second: the input is (B, dim, ...).
        build: makes the residual quantiser of a group from its number of channels.

    Attributes:
        rvqs: the residual quantisers.
    """

    rvqs: Any  # an nn.ModuleList, whose items type checkers take for tensors or bare modules

    def __init__(self, dim: int, groups: int, channels_second: bool, build: Callable[[int], ResidualStages]) -> None:
        super().__init__()
        checks.whole("dim", dim, 1)
        checks.whole("groups", groups, 1)
        if dim % groups:
            raise ValueError(f"dim must be a multiple of groups = {groups}; got {dim}")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = channels_second
        self.rvqs = nn.ModuleList(build(dim // groups) for _ in range(groups))

    @property
    def split_dim(self) -> int:
        """The dimension of the channels: 1 with accept_image_fmap, else -1."""
        return 1 if self.accept_image_fmap else -1

    @property
    def codebooks(self) -> Tensor:
        """The codebooks of all groups and stages, (G, Q, K, d)."""
        return torch.stack([rvq.codebooks for rvq in self.rvqs])

    def _per_group(self, indices: Tensor | Sequence[Tensor]) -> list[Tensor]:
        if len(indices) != self.groups:
            raise ValueError(f"indices must have one entry for each of groups = {self.groups}; got {len(indices)}")
        return list(indices)

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The codes of each group and stage, (G, Q, ..., d), from indices (G, ..., Q)."""
        pairs = zip(self.rvqs, self._per_group(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(part) for rvq, part in pairs])

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The output of `forward`, in its layout, from its indices (G, ..., Q)."""
        pairs = zip(self.rvqs, self._per_group(indices), strict=True)
        return torch.cat([self._group_output(rvq, part) for rvq, part in pairs], dim=self.split_dim)

    def _group_output(self, rvq: Any, indices: Tensor) -> Tensor:
        output: Tensor = rvq.get_output_from_indices(indices)
        return output

    def _run_groups(self, x: Tensor, return_all_codes: bool, **arguments: Any) -> tuple[Any, ...]:
        """Every group on its channels: outputs side by side, all else stacked, but for the codes: a tuple."""
        checks.tensor("x", x)
        if x.dim() < 2 or x.shape[self.split_dim] != self.dim:
            wanted = "(B, dim, ...)" if self.accept_image_fmap else "(..., dim)"
            raise ValueError(f"x must have shape {wanted}, with dim = {self.dim}; got {tuple(x.shape)}")
        last = self.rvqs[0]._last_stage(x.device, None)
        parts = x.chunk(self.groups, dim=self.split_dim)
        outputs = [
            rvq._forward(part, last, return_all_codes=return_all_codes, **arguments)
            for rvq, part in zip(self.rvqs, parts, strict=True)
        ]
        quantized, *rest = zip(*outputs, strict=True)
        codes = [rest.pop()] if return_all_codes else []
        return torch.cat(quantized, dim=self.split_dim), *(torch.stack(values) for values in rest), *codes
