"""Residual lookup-free quantisation: the signs of what is left, at half the size in every stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq.nn import checks
from fastvq.nn.channels import channels_back, channels_last, project, projections
from fastvq.nn.lfq import LFQ
from fastvq.nn.residual import GroupedStages, ResidualStages


class ResidualLFQ(ResidualStages):
    """`LFQ` in stages, stage q with codes 2^-q the size of the first one's.

    Takes the place of `vector_quantize_pytorch.ResidualLFQ` 1.32.0: the same arguments, defaults, returns and
    state_dict.

    Args:
        dim: channels of the input. Where it is not d, linear layers `project_in` and `project_out` lead there and back.
        num_quantizers: Q.
        codebook_size: 2^d, of every stage.
        quantize_dropout: in training, leave out the last stages at random; the argument takes effect from Q = 2 on.
        quantize_dropout_cutoff_index: the stages up to this one always run.
        quantize_dropout_multiple_of: the number of stages that run is rounded up to a multiple of this.
        soft_clamp_input_value: bound what the first stage gets smoothly to this, each further one to half as much.
        kwargs: further arguments of `LFQ`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._set_stages(num_quantizers, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        for name in ("num_codebooks", "keep_num_codebooks_dim", "has_projections", "codebook_scale"):
            if name in kwargs:
                raise ValueError(f"{name} is no argument of ResidualLFQ; got {kwargs[name]}")
        checks.whole("codebook_size", codebook_size, 2)
        checks.whole("dim", dim, 1)
        self.channel_first = kwargs.pop("channel_first", None)
        width = codebook_size.bit_length() - 1
        self.has_projections = dim != width
        self.project_in, self.project_out = projections(dim, width)
        self.dim = dim
        self.layers = nn.ModuleList(
            LFQ(
                codebook_size=codebook_size,
                codebook_scale=2**-number,
                soft_clamp_input_value=None if soft_clamp_input_value is None else soft_clamp_input_value * 0.5**number,
                **kwargs,
            )
            for number in range(num_quantizers)
        )

    @property
    def codebooks(self) -> Tensor:
        """The codes of each stage, (Q, 2^d, d), made anew at every call."""
        return torch.stack([layer.codebook for layer in self.layers])

    def _stage(self, number: int, residual: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.layers[number](residual, **arguments)
        return quantized, indices, loss

    def _stage_codes(self, indices: Tensor) -> Tensor:
        codes = [layer._codes_at(part) for layer, part in zip(self.layers, indices.unbind(-1), strict=True)]
        return torch.stack(codes, -2)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each stage, (Q, ..., d), from indices (..., Q); -1 gives zeros.

        With quantize_dropout there may be fewer stages. The sum of the codes is what `project_out` gets.
        """
        return self._codes(indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` from its indices (..., Q), but with the channels last: (..., dim)."""
        return project(self.project_out, self._codes(indices).sum(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise x.

        Args:
            x: (..., dim), or (B, dim, ...) with channel_first, or when that is None with four or more dimensions.
                Any floating dtype.
            mask: as in `LFQ.forward`.
            return_all_codes: return the codes of each stage too.
            rand_quantize_dropout_fixed_seed: decides which stages drop out, rather than torch's generator.

        Returns:
            quantized: the shape and dtype of x, with the gradient of every stage.
            indices: the shape of x without the channels, and a last dimension Q; int64, -1 for stages left out.
            losses: (Q,), that of `LFQ` for each stage; 0 for those left out.
            With return_all_codes a fourth, the codes as `get_codes_from_indices` gives them.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        checks.tensor("x", x)
        return self._forward(x, self._last_stage(x.device, rand_quantize_dropout_fixed_seed), mask, return_all_codes)

    def _forward(
        self, x: Tensor, last: int | Tensor | None, mask: Tensor | None, return_all_codes: bool
    ) -> tuple[Tensor, ...]:
        second = x.dim() >= 4 if self.channel_first is None else self.channel_first
        tokens = self.project_in(channels_last("x", x, self.dim, second))
        kept = None if mask is None else checks.token_mask(mask, tokens.shape[:-1])
        quantized, indices, losses = self._quantize(tokens, last, mask=kept)
        assert losses is not None
        found = channels_back(self.project_out(quantized), second), indices, losses
        return (*found, self._codes(indices)) if return_all_codes else found


class GroupedResidualLFQ(GroupedStages):
    """`ResidualLFQ` for each group of channels.

    Takes the place of `vector_quantize_pytorch.GroupedResidualLFQ` 1.32.0.

    Args:
        dim: channels of the input, a multiple of groups.
        groups: G.
        accept_image_fmap: the input is (B, dim, ...).
        kwargs: further arguments of `ResidualLFQ`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        if accept_image_fmap:
            kwargs.setdefault("channel_first", True)
        super().__init__(dim, groups, accept_image_fmap, lambda width: ResidualLFQ(dim=width, **kwargs))

    def _group_output(self, rvq: Any, indices: Tensor) -> Tensor:
        return channels_back(super()._group_output(rvq, indices), self.accept_image_fmap)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False) -> tuple[Any, ...]:
        """Quantise x (..., dim), or (B, dim, ...) with accept_image_fmap.

        Returns:
            As `ResidualLFQ.forward`: quantized of all groups; indices and losses stacked, (G, ...); codes a tuple.
        """
        return self._run_groups(x, return_all_codes, mask=mask)
