"""Latent quantisation: every channel to the nearest of a few learnt numbers (Hsu et al., 2023, arXiv:2305.18378)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fastvq.nn import checks
from fastvq.nn.channels import at_least_float32, channels_back, channels_last, project, projections
from fastvq.nn.mixed_radix import MixedRadix
from fastvq.nn.recompute import apart, recomputing
from fastvq.nn.straight_through import straight_through


class _FixedValues(nn.Module):
    """Tensors that move with their module, and are neither trained nor saved."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        for number, value in enumerate(values):
            self.register_buffer(str(number), value, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.buffers())

    def __getitem__(self, number: int) -> Tensor:
        return list(self)[number]


class LatentQuantize(MixedRadix):
    """Replace each of d channels by the nearest value of its own scalar codebook; the values are learnt.

    Takes the place of `vector_quantize_pytorch.LatentQuantize` 1.32.0: the same arguments, defaults, returns and
    state_dict. There the values never get a gradient; here the loss trains them, as the paper has it.

    Args:
        levels: the number of values of each channel of a code; an int stands for codebook_dim of them.
        dim: channels of the input. Where it is not num_codebooks * d, linear layers `project_in` and `project_out`
            lead there and back.
        commitment_loss_weight, quantization_loss_weight: weights of mean((x - output)^2), the gradient of the first
            going to the output, of the second to x. None means 0.
        num_codebooks: codes that a token is split into; they share their values.
        codebook_dim: d; -1 takes the number of levels.
        keep_num_codebooks_dim: indices have a last dimension num_codebooks; None or False mean where that is more
            than 1.
        optimize_values: the values are parameters.
        in_place_codebook_optimizer: makes from the values an optimiser that takes a step in each training forward, on
            mean((sg[x] - q)^2); the output is then quantised anew.
        strict_compat: the values get no gradient from the loss, as in vector-quantize-pytorch.

    Attributes:
        values_per_latent: the values of each channel.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    commitment_loss_weight: Tensor
    quantization_loss_weight: Tensor

    def __init__(
        self,
        levels: Sequence[int] | int,
        dim: int,
        commitment_loss_weight: float | None = 0.1,
        quantization_loss_weight: float | None = 0.1,
        num_codebooks: int = 1,
        codebook_dim: int = -1,
        keep_num_codebooks_dim: bool | None = None,
        optimize_values: bool | None = True,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        *,
        strict_compat: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(levels, int):
            checks.whole("codebook_dim, with an int for levels,", codebook_dim, 1)
            levels = [levels] * codebook_dim
        self._set_levels(levels, 2)
        if codebook_dim not in (-1, self.codebook_dim):
            raise ValueError(f"codebook_dim must be the number of levels, {self.codebook_dim}; got {codebook_dim}")
        checks.whole("dim", dim, 1)
        checks.whole("num_codebooks", num_codebooks, 1)
        for name, weight in (
            ("commitment_loss_weight", commitment_loss_weight),
            ("quantization_loss_weight", quantization_loss_weight),
        ):
            checks.number(name, 0.0 if weight is None else weight)
            self.register_buffer(name, torch.tensor(weight or 0.0, dtype=torch.float32), persistent=False)
        self._losing = bool(commitment_loss_weight), bool(quantization_loss_weight)
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = checks.keep_codebooks_dim(keep_num_codebooks_dim or None, num_codebooks)
        self.strict_compat = strict_compat
        self.has_projections = dim != self.effective_codebook_dim
        self.project_in, self.project_out = projections(dim, self.effective_codebook_dim)
        values = [
            torch.linspace(-0.5, 0.5, level) if level % 2 else torch.arange(level) / level - 0.5 for level in levels
        ]
        self.values_per_latent: nn.ParameterList | _FixedValues
        if optimize_values:
            self.values_per_latent = nn.ParameterList(nn.Parameter(value) for value in values)
        else:
            self.values_per_latent = _FixedValues(values)
        self.in_place_codebook_optimizer: Any = in_place_codebook_optimizer
        if in_place_codebook_optimizer is not None:
            if not optimize_values:
                raise ValueError("in_place_codebook_optimizer needs optimize_values=True; got False")
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self.values_per_latent)

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes (codebook_size, d) in the order of their indices, made anew at every call."""
        return self._codes_at(torch.arange(self.codebook_size, device=self._levels.device))

    def _table(self) -> Tensor:
        """The values of all channels, (d, most levels), filled up with infinity, which is nearest to nothing."""
        return pad_sequence(list(self.values_per_latent), batch_first=True, padding_value=torch.inf)

    def _codes_at(self, indices: Tensor) -> Tensor:
        return self._values_at(self.indices_to_level_indices(indices))

    def _values_at(self, level_indices: Tensor) -> Tensor:
        """The values (..., d) with numbers (..., d)."""
        return self._table()[torch.arange(self.codebook_dim, device=level_indices.device), level_indices]

    def _nearest(self, z: Tensor) -> Tensor:
        """For each number of z (..., d) the number of the nearest value of its channel, the first of equals."""
        return (at_least_float32(z).detach().unsqueeze(-1) - self._table().detach()).abs().argmin(-1)

    def quantize(self, z: Tensor) -> Tensor:
        """z (..., d) to the nearest values, with the straight-through gradient to z."""
        return straight_through(z, self._values_at(self._nearest(z)).to(z.dtype))

    def quantization_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """mean((z - sg[zhat])^2)."""
        return functional.mse_loss(zhat.detach(), z, reduction=reduce)

    def commitment_loss(self, z: Tensor, zhat: Tensor, reduce: str = "mean") -> Tensor:
        """mean((sg[z] - zhat)^2)."""
        return functional.mse_loss(z.detach(), zhat, reduction=reduce)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Codes (..., d) to indices (...): int32, or int64 from 2^31 codes on."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(f"zhat must have {self.codebook_dim} numbers a code; got shape {tuple(zhat.shape)}")
        return self._digits_to_indices(self._nearest(zhat))

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The output of `forward` from its indices.

        Args:
            indices: (B, ...), or (B, ..., num_codebooks) with keep_num_codebooks_dim; int32 or int64.
            project_out: False leaves `project_out` out.

        Returns:
            (B, dim, ...), or (B, num_codebooks * d, ...) without project_out.
        """
        codes = self._codes_at(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        return channels_back(project(self.project_out, codes) if project_out else codes, True)

    def quantize_and_project(self, z: Tensor, is_img_or_video: Any = None, ps: Any = None) -> tuple[Tensor, ...]:
        """What `forward` does between `project_in` and the loss.

        Args:
            z: (B, ..., num_codebooks, d).
            is_img_or_video, ps: without effect; vector-quantize-pytorch has them.

        Returns:
            codes (B, ..., num_codebooks * d), output (B, dim, ...), indices as `forward` gives them.
        """
        level_indices = self._nearest(z)
        codes = straight_through(z, self._values_at(level_indices).to(z.dtype)).flatten(-2)
        return codes, channels_back(self.project_out(codes), True), self._indices(level_indices)

    def _indices(self, level_indices: Tensor) -> Tensor:
        indices = self._digits_to_indices(level_indices)
        return indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def _step_in_place(self, z: Tensor) -> None:
        values = list(self.values_per_latent)
        with torch.enable_grad(), apart():
            loss = functional.mse_loss(self._values_at(self._nearest(z)), at_least_float32(z.detach()))
            gradients = torch.autograd.grad(loss, values)
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise z.

        Args:
            z: (B, dim, ...). Any floating dtype.

        Returns:
            quantized: the shape and dtype of z, with the straight-through gradient.
            indices: (B, ...), and a last dimension num_codebooks with keep_num_codebooks_dim; int32, or int64 from
                2^31 codes on.
            loss: (), commitment_loss_weight * mean((sg[z] - quantized)^2) + quantization_loss_weight *
                mean((z - sg[quantized])^2); 0 in eval mode.

        Raises:
            TypeError, ValueError: z is no tensor, or dim is not where it should be.
        """
        parts = self.project_in(channels_last("z", z, self.dim, True))
        parts = parts.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        if self.in_place_codebook_optimizer is not None and self.training and not recomputing():
            self._step_in_place(parts)
        level_indices = self._nearest(parts)
        values = self._values_at(level_indices).to(parts.dtype)
        output = channels_back(self.project_out(straight_through(parts, values).flatten(-2)), True)
        return output, self._indices(level_indices), self._loss(z, output, parts, values)

    def _loss(self, z: Tensor, output: Tensor, parts: Tensor, values: Tensor) -> Tensor:
        commits, quantizes = self._losing
        loss = torch.zeros((), device=z.device)
        if not self.training or z.numel() == 0:
            return loss
        if commits:
            if values.requires_grad and not self.strict_compat:  # the same output, through which the values learn too
                taught = straight_through(parts, values) + (values - values.detach())
                output = channels_back(self.project_out(taught.flatten(-2)), True)
            loss = loss + self.commitment_loss_weight * self.commitment_loss(z, output)
        if quantizes:
            loss = loss + self.quantization_loss_weight * self.quantization_loss(z, output)
        return loss

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        return f"levels={self._levels.tolist()}, dim={self.dim}, num_codebooks={self.num_codebooks}"
