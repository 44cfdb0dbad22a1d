"""SimVQ (Zhu et al., 2024, arXiv:2411.02038): frozen codes through one learnt linear map, so that all of them move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvq import functional
from fastvq.nn import checks
from fastvq.nn.channels import channels_back, channels_last
from fastvq.nn.residual import ResidualStages
from fastvq.nn.rotation import rotate_gradient


def _identity(codes: Tensor) -> Tensor:
    return codes


class SimVQ(nn.Module):
    """Replace every token by the nearest of the codes W c, with c frozen and W learnt.

    Takes the place of `vector_quantize_pytorch.SimVQ` 1.32.0: the same arguments, defaults, returns and state_dict.

    Args:
        dim: channels of the input and of the codes.
        codebook_size: K.
        codebook_transform: a module that takes the frozen codes to the codes; None makes a linear layer without bias.
        init_fn: what is done to the Gaussian draw of the frozen codes, (K, frozen_codebook_dim), of variance
            1 / frozen_codebook_dim.
        channel_first: the input is (B, dim, ...).
        rotation_trick: gradients pass to x turned and scaled as x is to its code (arXiv:2410.06424), not as they are.
        input_to_quantize_commit_loss_weight: see commitment_weight.
        commitment_weight: weight of mean((sg[x] - q)^2) + input_to_quantize_commit_loss_weight * mean((x - sg[q])^2).
        frozen_codebook_dim: channels of the frozen codes; None takes dim.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] = _identity,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        checks.whole("dim", dim, 1)
        checks.whole("codebook_size", codebook_size, 1)
        checks.whole("frozen_codebook_dim", frozen_dim, 1)
        checks.number("input_to_quantize_commit_loss_weight", input_to_quantize_commit_loss_weight)
        checks.number("commitment_weight", commitment_weight)
        self.dim = dim
        self.codebook_dim = dim
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        frozen = init_fn(torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5)
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_dim, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", frozen)

    @property
    def codebook(self) -> Tensor:
        """The codes (K, dim), made anew at every call; differentiable to the transform."""
        codes: Tensor = self.code_transform(self.frozen_codebook)
        return codes

    def _codes_at(self, indices: Tensor) -> Tensor:
        codes: Tensor = self.code_transform(self.frozen_codebook[indices])
        return codes

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The output of `forward` from its indices (...): (..., dim), or (B, dim, ...) with channel_first."""
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        return channels_back(self._codes_at(indices), self.channel_first)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise x.

        Args:
            x: (..., dim), or (B, dim, ...) with channel_first. Any floating dtype.

        Returns:
            quantized: the shape and dtype of x; no gradient passes from it to the codes.
            indices: the shape of x without the channels; int64.
            loss: (), at least float32; in eval mode too; see commitment_weight.

        Raises:
            TypeError, ValueError: x is no tensor, or dim is not where it should be.
        """
        rows = channels_last("x", x, self.dim, self.channel_first)
        quantized, indices, loss = functional.vector_quantize(
            rows,
            self.codebook,
            commitment_weight=self.commitment_weight * self.input_to_quantize_commit_loss_weight,
            codebook_weight=self.commitment_weight,
        )
        if self.rotation_trick and rows.requires_grad:
            quantized = rotate_gradient(rows, quantized)
        return channels_back(quantized, self.channel_first), indices, loss

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        return f"dim={self.dim}, codebook_size={self.codebook_size}, rotation_trick={self.rotation_trick}"


class ResidualSimVQ(ResidualStages):
    """`SimVQ` in stages.

    Takes the place of `vector_quantize_pytorch.ResidualSimVQ` 1.32.0: the same arguments, defaults, returns and
    state_dict.

    Args:
        dim: channels of the input and of the codes.
        num_quantizers: Q.
        codebook_size: K, of every stage.
        heads: must be 1.
        quantize_dropout: in training, leave out the last stages at random; the argument takes effect from Q = 2 on.
        quantize_dropout_cutoff_index: the stages up to this one always run.
        quantize_dropout_multiple_of: the number of stages that run is rounded up to a multiple of this.
        channel_first: the input is (B, dim, ...).
        rotation_trick: of `SimVQ`.
        sim_vq_kwargs: further arguments of `SimVQ`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads must be 1 in a residual quantiser; got {heads}")
        self._set_stages(num_quantizers, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        self.dim = dim
        self.channel_first = channel_first
        self.layers = nn.ModuleList(
            SimVQ(dim, codebook_size, channel_first=channel_first, rotation_trick=rotation_trick, **sim_vq_kwargs)
            for _ in range(num_quantizers)
        )

    @property
    def codebook_size(self) -> int:
        """K, of every stage."""
        size: int = self.layers[0].codebook_size
        return size

    @property
    def codebook_dim(self) -> int:
        """Channels of a code."""
        return self.dim

    @property
    def codebooks(self) -> Tensor:
        """The codes of each stage, (Q, K, dim), made anew at every call."""
        return torch.stack([layer.codebook for layer in self.layers])

    def _stage(self, number: int, residual: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.layers[number](residual)
        return quantized, indices, loss

    def _stage_codes(self, indices: Tensor) -> Tensor:
        codes = [layer._codes_at(part) for layer, part in zip(self.layers, indices.unbind(-1), strict=True)]
        return torch.stack(codes, -2)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of each stage, (Q, ..., dim), or (Q, B, dim, ...) with channel_first, from indices (..., Q).

        An index of -1 gives zeros. With quantize_dropout there may be fewer stages.
        """
        codes = self._codes(indices)
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The output of `forward` from its indices (..., Q)."""
        return channels_back(self._codes(indices).sum(0), self.channel_first)

    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, ...]:
        """Quantise x.

        Args:
            x: (..., dim), or (B, dim, ...) with channel_first. Any floating dtype.
            return_all_codes: return the codes of each stage too.
            rand_quantize_dropout_fixed_seed: decides which stages drop out, rather than torch's generator.

        Returns:
            quantized: the shape and dtype of x, with the gradient of every stage.
            indices: the shape of x without the channels, and a last dimension Q; int64, -1 for stages left out.
            losses: (Q,), that of `SimVQ` for each stage; 0 for those left out.
            With return_all_codes a fourth, the codes as `get_codes_from_indices` gives them.

        Raises:
            TypeError, ValueError: x is no tensor, or dim is not where it should be.
        """
        tokens = channels_last("x", x, self.dim, self.channel_first)
        last = self._last_stage(x.device, rand_quantize_dropout_fixed_seed)
        quantized, indices, losses = self._quantize(tokens, last)
        assert losses is not None
        found = channels_back(quantized, self.channel_first), indices, losses
        return (*found, self.get_codes_from_indices(indices)) if return_all_codes else found
