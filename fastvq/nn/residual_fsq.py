"""Residual finite scalar quantisation: every stage rounds what is left to a grid that is finer by the levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvq.nn import checks
from fastvq.nn.channels import channels_back, channels_last, project, projections
from fastvq.nn.fsq import FSQ
from fastvq.nn.residual import GroupedStages, ResidualStages


class ResidualFSQ(ResidualStages):
    """`FSQ` in stages, symmetric, stage q on a grid levels^-q times the first one's.

    Takes the place of `vector_quantize_pytorch.ResidualFSQ` 1.32.0: the same arguments, defaults, returns and
    state_dict.

    Args:
        levels: of `FSQ`, the same in every stage.
        num_quantizers: Q.
        dim: channels of the input; None takes the number of levels. Where it is another number, linear layers
            `project_in` and `project_out` lead there and back.
        is_channel_first: the input is (B, dim, ...) and indices (B, Q, ...).
        quantize_dropout: in training, leave out the last stages at random; the argument takes effect from Q = 2 on.
        quantize_dropout_cutoff_index: the stages up to this one always run.
        quantize_dropout_multiple_of: the number of stages that run is rounded up to a multiple of this.
        soft_clamp_input_value: bound the input smoothly to this; only without bound_hard_clamp.
        bound_hard_clamp: clamp what a stage gets to -1 and 1, after a smooth bound of the input to 1 + 1 / (L - 1).
        strict_compat: `get_codes_from_indices` and `get_output_from_indices` take indices (B, ..., Q) and give
            channels last even with is_channel_first, as vector-quantize-pytorch does.
        kwargs: further arguments of `FSQ`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    scales: Tensor
    soft_clamp_input_value: Tensor | None

    def __init__(
        self,
        *,
        levels: Sequence[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | Sequence[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        strict_compat: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._set_stages(num_quantizers, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        for name in ("num_codebooks", "keep_num_codebooks_dim", "channel_first", "preserve_symmetry"):
            if name in kwargs:
                raise ValueError(f"{name} is no argument of ResidualFSQ; got {kwargs[name]}")
        if not kwargs.get("return_indices", True):
            raise ValueError("return_indices must be True in ResidualFSQ; got False")
        width = len(levels)
        dim = width if dim is None else dim
        self.has_projections = dim != width
        self.project_in, self.project_out = projections(dim, width)
        self.dim = dim
        self.is_channel_first = is_channel_first
        self.strict_compat = strict_compat
        self.levels = levels
        self.layers = nn.ModuleList(
            FSQ(levels, width, preserve_symmetry=True, bound_hard_clamp=bound_hard_clamp, **kwargs)
            for _ in range(num_quantizers)
        )
        self.codebook_size = self.layers[0].codebook_size
        counts = torch.tensor(levels)
        scales = torch.stack([counts.float() ** -number for number in range(num_quantizers)])
        self.register_buffer("scales", scales, persistent=False)
        if bound_hard_clamp:
            if soft_clamp_input_value is not None:
                raise ValueError("soft_clamp_input_value needs bound_hard_clamp=False, which bounds the input already")
            soft_clamp_input_value = 1 + 1 / (counts - 1)
        elif soft_clamp_input_value is not None:
            soft_clamp_input_value = torch.as_tensor(soft_clamp_input_value, dtype=torch.float32)
        self.register_buffer("soft_clamp_input_value", soft_clamp_input_value, persistent=False)

    @property
    def codebooks(self) -> Tensor:
        """The codes of each stage before its scale, (Q, K, d), made anew at every call."""
        return torch.stack([layer.implicit_codebook for layer in self.layers])

    def _stage(self, number: int, residual: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, None]:
        scale = self.scales[number].to(residual.dtype)
        quantized, indices = self.layers[number](residual / scale)
        return quantized * scale, indices, None

    def _stage_codes(self, indices: Tensor) -> Tensor:
        codes = [layer._codes_at(part) for layer, part in zip(self.layers, indices.unbind(-1), strict=True)]
        return torch.stack(codes, -2) * self.scales

    @property
    def _stages_second(self) -> bool:
        return self.is_channel_first and not self.strict_compat

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each stage, scaled; their sum is what `project_out` gets.

        Args:
            indices: as `forward` returns them: (..., Q), or (B, Q, ...) with is_channel_first; -1 gives zeros. With
                quantize_dropout there may be fewer stages.

        Returns:
            (Q, ..., d), or (Q, B, d, ...) with is_channel_first.
        """
        if not self._stages_second:
            return self._codes(indices)
        return self._codes(indices.movedim(1, -1)).movedim(-1, 2)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` from its indices, as `get_codes_from_indices` takes them."""
        second = self._stages_second
        codes = self._codes(indices.movedim(1, -1) if second else indices)
        return channels_back(project(self.project_out, codes.sum(0)), second)

    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, ...]:
        """Quantise x.

        Args:
            x: (..., dim), or (B, dim, ...) with is_channel_first. Any floating dtype.
            return_all_codes: return the codes of each stage too.
            rand_quantize_dropout_fixed_seed: decides which stages drop out, rather than torch's generator.

        Returns:
            quantized: the shape and dtype of x, with the straight-through gradient of every stage.
            indices: (..., Q), or (B, Q, ...) with is_channel_first; int32 (int64 from 2^31 codes on), -1 for stages
                that were left out.
            With return_all_codes a third, the codes as `get_codes_from_indices` gives them.

        Raises:
            TypeError, ValueError: x is no tensor, or dim is not where it should be.
        """
        checks.tensor("x", x)
        return self._forward(x, self._last_stage(x.device, rand_quantize_dropout_fixed_seed), return_all_codes)

    def _forward(self, x: Tensor, last: int | Tensor | None, return_all_codes: bool) -> tuple[Tensor, ...]:
        tokens = self.project_in(channels_last("x", x, self.dim, self.is_channel_first))
        if self.soft_clamp_input_value is not None:
            tokens = (tokens / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        quantized, indices, _ = self._quantize(tokens, last)
        output = project(self.project_out, quantized).to(x.dtype)
        found = channels_back(output, self.is_channel_first), channels_back(indices, self.is_channel_first)
        if not return_all_codes:
            return found
        codes = self._codes(indices)
        return *found, codes.movedim(-1, 2) if self._stages_second else codes


class GroupedResidualFSQ(GroupedStages):
    """`ResidualFSQ` for each group of channels.

    Takes the place of `vector_quantize_pytorch.GroupedResidualFSQ` 1.32.0.

    Args:
        dim: channels of the input, a multiple of groups.
        groups: G.
        accept_image_fmap: the input is (B, dim, ...), and so is each group's: is_channel_first.
        kwargs: further arguments of `ResidualFSQ`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        if kwargs.setdefault("is_channel_first", accept_image_fmap) != accept_image_fmap:
            raise ValueError(
                f"is_channel_first must be accept_image_fmap = {accept_image_fmap}; got {kwargs['is_channel_first']}"
            )
        super().__init__(dim, groups, accept_image_fmap, lambda width: ResidualFSQ(dim=width, **kwargs))
        self.codebook_size = self.rvqs[0].codebook_size

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple[Any, ...]:
        """Quantise x (..., dim), or (B, dim, ...) with accept_image_fmap.

        Returns:
            As `ResidualFSQ.forward`: quantized of all groups, indices of each stacked, (G, ...); codes a tuple of G.
        """
        return self._run_groups(x, return_all_codes)
