"""Lookup-free quantisation: every channel by its sign (MAGVIT-v2: Yu et al., 2023, arXiv:2310.05737)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvq.nn import checks
from fastvq.nn.binary_entropy import bit_entropies, entropy
from fastvq.nn.channels import at_least_float32, autocast_off, channels_back, channels_last, project, projections
from fastvq.nn.distributed import mean_over_processes
from fastvq.nn.straight_through import straight_through


class Return(NamedTuple):
    """What `LFQ` returns."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    """The parts of the loss of `LFQ`, unweighted."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """The cosine of x with each column of a matrix, times a scale: (..., dim_in) to (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim_in): its cosines (..., dim_out)."""
        return functional.normalize(x, dim=-1) @ functional.normalize(self.weight, dim=0) * self.scale


class LFQ(nn.Module):
    """The code of a token is the signs of its d channels; an entropy loss keeps the codes confident and in use.

    Takes the place of `vector_quantize_pytorch.LFQ` 1.32.0: the same arguments, defaults, returns and state_dict. The
    loss is the same to rounding, in memory O(N d + 2^d) rather than O(N 2^d): see `fastvq.nn.binary_entropy`.

    Args:
        dim: channels of the input; None takes num_codebooks * d.
        codebook_size: 2^d; None takes 2^dim.
        entropy_loss_weight: weight of (mean entropy of a token) - diversity_gamma * (entropy of the batch).
        commitment_loss_weight: weight of mean((x - sg[q])^2).
        diversity_gamma: see entropy_loss_weight.
        straight_through_activation: the gradient in training is that of this module.
        num_codebooks: codes that a token is split into.
        keep_num_codebooks_dim: indices have a last dimension num_codebooks; None means where that is more than 1.
        codebook_scale: a code is -codebook_scale or codebook_scale in every channel.
        frac_per_sample_entropy: take the entropies from a random choice of so many of the tokens; more than 0, up to 1.
        has_projections: linear layers `project_in` and `project_out`; None means where dim is not num_codebooks * d.
        projection_has_bias: of those layers.
        soft_clamp_input_value: bound the input smoothly to this; at least codebook_scale.
        cosine_sim_project_in: `project_in` takes cosines, times cosine_sim_project_in_scale.
        cosine_sim_project_in_scale: None takes codebook_scale.
        channel_first: the input is (B, dim, ...); None means where it has four or more dimensions.
        experimental_softplus_entropy_loss: the entropy loss is softplus(loss + entropy_loss_offset), so positive.
        entropy_loss_offset: see experimental_softplus_entropy_loss.
        spherical: inputs and codes lie on a sphere of radius codebook_scale (arXiv:2406.07548).
        force_quantization_f32: quantise in float32 (float64 for float64 input), whatever the input and autocast.
        orthogonal_rotation: quantise in a random rotated basis (arXiv:2307.13304).
        strict_compat: with a mask, the mean entropy of a token stands for that of the batch too, as
            vector-quantize-pytorch has it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    mask: Tensor
    zero: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module = nn.Identity(),  # noqa: B008
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
        strict_compat: bool = False,
    ) -> None:
        super().__init__()
        if codebook_size is None:
            if dim is None:
                raise ValueError("dim or codebook_size must be given; got neither")
            checks.whole("dim", dim, 1)
            codebook_size = 2**dim
        checks.whole("codebook_size", codebook_size, 1)
        checks.whole("num_codebooks", num_codebooks, 1)
        self.codebook_dim = codebook_size.bit_length() - 1
        if codebook_size != 2**self.codebook_dim:
            raise ValueError(
                f"codebook_size must be a power of 2, such as {2 ** (self.codebook_dim + 1)}; got {codebook_size}"
            )
        checks.number("frac_per_sample_entropy", frac_per_sample_entropy, 0.0, 1.0)
        if frac_per_sample_entropy == 0:
            raise ValueError("frac_per_sample_entropy must be more than 0; got 0")
        if soft_clamp_input_value is not None and not soft_clamp_input_value >= codebook_scale:
            raise ValueError(
                f"soft_clamp_input_value must be at least codebook_scale = {codebook_scale}; "
                f"got {soft_clamp_input_value}"
            )
        width = self.codebook_dim * num_codebooks
        self.dim = width if dim is None else dim
        checks.whole("dim", self.dim, 1 if codebook_size > 1 else 0)
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = checks.keep_codebooks_dim(keep_num_codebooks_dim, num_codebooks)
        self.has_projections = self.dim != width if has_projections is None else has_projections
        if not self.has_projections and self.dim != width:
            raise ValueError(f"has_projections=False needs dim = {width}, num_codebooks * d; got dim={self.dim}")
        if cosine_sim_project_in and self.has_projections:
            scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
            self.project_in: nn.Module = CosineSimLinear(self.dim, width, scale)
            self.project_out: nn.Module = nn.Linear(width, self.dim, bias=projection_has_bias)
        else:
            self.project_in, self.project_out = projections(
                self.dim, width, needed=self.has_projections, bias=projection_has_bias
            )
        self.channel_first = channel_first
        self.activation = straight_through_activation
        self.spherical = spherical
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(2 * [self.codebook_dim])))
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.force_quantization_f32 = force_quantization_f32
        self.strict_compat = strict_compat
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes that `indices_to_codes` gives."""
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """All codes (2^d, d) in the order of their indices, before `maybe_l2norm`; made anew at every call."""
        return self.bits_to_codes(self._bits(torch.arange(self.codebook_size, device=self.mask.device)))

    def maybe_l2norm(self, t: Tensor) -> Tensor:
        """t (..., d) on the sphere of radius codebook_scale where that is asked for."""
        return functional.normalize(t, dim=-1) * self.codebook_scale if self.spherical else t

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Bits 0 and 1, as numbers of any dtype, to -codebook_scale and codebook_scale."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def _bits(self, indices: Tensor) -> Tensor:
        return (indices.unsqueeze(-1) & self.mask != 0).to(self.dtype)

    def _codes_at(self, indices: Tensor) -> Tensor:
        """Indices (...) to codes (..., d), as `forward` gives them before `project_out`."""
        codes = self.maybe_l2norm(self.bits_to_codes(self._bits(indices)))
        return self._rotate_back(codes)

    def _rotate_back(self, codes: Tensor) -> Tensor:
        return codes @ self.orthogonal_rot.to(codes.dtype).t() if self.orthogonal_rotation else codes

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The output of `forward` from its indices.

        Args:
            indices: (...), or (..., num_codebooks) with keep_num_codebooks_dim; int64 or int32.
            project_out: False leaves `project_out` out.

        Returns:
            (..., dim), or (..., num_codebooks * d) without project_out; channels second with channel_first, or when
            that is None from the indices of an image or video.
        """
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        image = indices.dim() >= 3 + self.keep_num_codebooks_dim
        codes = self._codes_at(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        if project_out:
            codes = project(self.project_out, codes)
        return channels_back(codes, image if self.channel_first is None else self.channel_first)

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Return | tuple[Return, LossBreakdown]:
        """Quantise x.

        Args:
            x: (..., dim), or (B, dim, ...) with channel_first, or when that is None with four or more dimensions.
                Any floating dtype.
            inv_temperature: a token is taken to choose code c with a probability in proportion to
                exp(2 * inv_temperature * x.c); this concerns the loss alone.
            return_loss_breakdown: return the parts of the loss too.
            mask: bool, the shape of x without the channels, or that flattened to (B, N); the loss leaves out tokens
                where it is False. Without any token it is 0.

        Returns:
            quantized: the shape and dtype of x; the gradient is straight through `straight_through_activation` in
                training, and there is none in eval mode.
            indices: the shape of x without the channels, and a last dimension num_codebooks with
                keep_num_codebooks_dim; int64, the first channel the highest bit.
            entropy_aux_loss: (), at least float32; 0 in eval mode.
            With return_loss_breakdown these three, and (per_sample_entropy, batch_entropy, commitment), each ().

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        checks.tensor("x", x)
        second = x.dim() >= 4 if self.channel_first is None else self.channel_first
        tokens = self.project_in(channels_last("x", x, self.dim, second))
        if self.soft_clamp_input_value is not None:
            tokens = (tokens / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        with autocast_off(x, self.force_quantization_f32):
            rows = at_least_float32(tokens) if self.force_quantization_f32 else tokens
            rows = rows.unflatten(-1, (self.num_codebooks, self.codebook_dim))
            if self.orthogonal_rotation:
                rows = rows @ self.orthogonal_rot.to(rows.dtype)
            rows = self.maybe_l2norm(rows)
            bits = rows > 0
            indices = (bits * self.mask).sum(-1)
            codes = self.maybe_l2norm(self.bits_to_codes(bits.to(rows.dtype)))
            loss, breakdown = self._losses(rows, codes, inv_temperature, mask)
            quantized = straight_through(self.activation(rows), codes) if self.training else codes
            quantized = self._rotate_back(quantized).flatten(-2).to(tokens.dtype)
        output = channels_back(self.project_out(quantized), second)
        found = Return(output, indices if self.keep_num_codebooks_dim else indices.squeeze(-1), loss)
        return (found, breakdown) if return_loss_breakdown else found

    def _losses(
        self, rows: Tensor, codes: Tensor, inv_temperature: float, mask: Tensor | None
    ) -> tuple[Tensor, LossBreakdown]:
        """The loss of rows (..., C, d) and its parts; zero in eval mode."""
        if not self.training:
            zero = self.zero.detach()
            return zero * self.entropy_loss_weight, LossBreakdown(zero, zero, zero)
        kept = None if mask is None else checks.token_mask(mask, rows.shape[:-2])
        rows, codes = at_least_float32(rows.flatten(0, -3)), at_least_float32(codes.flatten(0, -3).detach())
        if kept is not None:  # padding may hold anything, NaN too
            rows, codes = (torch.where(kept[:, None, None], part, 0.0) for part in (rows, codes))
        per_sample, batch = self._entropies(rows, kept, inv_temperature)
        if self.strict_compat and kept is not None:
            batch = per_sample
        loss = per_sample - self.diversity_gamma * batch
        if self.experimental_softplus_entropy_loss:
            loss = functional.softplus(loss + self.entropy_loss_offset)
        commitment = self.zero.detach()
        if self.commitment_loss_weight > 0:
            weights = _mean_weights(rows, kept)
            commitment = ((rows - codes).square().mean((1, 2)) * weights).sum()
        total = loss * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        return total, LossBreakdown(per_sample, batch, commitment)

    def _entropies(self, rows: Tensor, kept: Tensor | None, inv_temperature: float) -> tuple[Tensor, Tensor]:
        """The mean entropy of rows (N, C, d), and that of their mean distribution."""
        if self.frac_per_sample_entropy < 1.0:
            rows, kept = self._sample(rows, kept)
        # Codes that differ in one bit differ in that channel by twice its size, and 2 * inv_temperature * x.c by this.
        size = self.codebook_scale / math.sqrt(self.codebook_dim) if self.spherical else self.codebook_scale
        logits = (rows * (4 * inv_temperature * size)).transpose(0, 1)
        per_sample, mean = bit_entropies(logits, _mean_weights(rows, kept))
        return per_sample, entropy(mean_over_processes(mean)).mean()

    def _sample(self, rows: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A random choice of the rows, frac_per_sample_entropy of those that take part."""
        keys = torch.randn(rows.shape[0], device=rows.device)
        if kept is None:
            wanted = int(rows.shape[0] * self.frac_per_sample_entropy)
            return rows[keys.argsort().argsort()[:wanted]], None
        rank = keys.masked_fill(~kept, math.inf).argsort().argsort()
        return rows, rank < (kept.sum() * self.frac_per_sample_entropy).floor()

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        return f"dim={self.dim}, codebook_size={self.codebook_size}, num_codebooks={self.num_codebooks}"


def _mean_weights(rows: Tensor, kept: Tensor | None) -> Tensor:
    """Weights (N,) that make a sum over rows (N, ...) the mean of those that take part."""
    if kept is None:
        return rows.new_full((rows.shape[0],), 1 / max(1, rows.shape[0]))
    counted = kept.to(rows.dtype)
    return counted / counted.sum().clamp(min=1)
