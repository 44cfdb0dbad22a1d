"""Finite scalar quantisation: every channel rounded to a few levels (Mentzer et al., 2023, arXiv:2309.15505)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvq.nn import checks
from fastvq.nn.channels import autocast_off, channels_back, channels_last, project, projections
from fastvq.nn.mixed_radix import MixedRadix
from fastvq.nn.straight_through import straight_through


class FSQ(MixedRadix):
    """Bound each of d channels, round it to one of its levels; the code is the product of the levels.

    Takes the place of `vector_quantize_pytorch.FSQ` 1.32.0: the same arguments, defaults, returns and state_dict.
    Codes are exact, and so are indices for any number of codes and any dtype.

    Args:
        levels: the number of levels of each channel of a code.
        dim: channels of the input; None takes num_codebooks * d. Where it is another number, linear layers
            `project_in` and `project_out` lead there and back.
        num_codebooks: codes that a token is split into.
        keep_num_codebooks_dim: indices have a last dimension num_codebooks; None means where that is more than 1.
        scale: kept as an attribute; without effect, as in the class we stand in for.
        allowed_dtypes: dtypes that force_quantization_f32 leaves alone.
        channel_first: the input is (B, dim, ...); so is every input of four and more dimensions.
        projection_has_bias: of `project_in` and `project_out`.
        return_indices: False returns None for them.
        force_quantization_f32: quantise in float32, whatever the input and autocast.
        preserve_symmetry: levels evenly from -1 to 1 (section 3.2 of arXiv:2411.19842), not an integer grid.
        noise_dropout: in training, how many of the numbers are moved by up to half a unit at random; 0 to 1.
        bound_hard_clamp: bound by clamping to -1 and 1, rather than by tanh.
        orthogonal_rotation: quantise in a random rotated basis (arXiv:2307.13304); best with equal levels.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        self._set_levels(levels, 2 if preserve_symmetry else 3, "" if preserve_symmetry else ", or preserve_symmetry")
        checks.whole("num_codebooks", num_codebooks, 1)
        checks.number("noise_dropout", noise_dropout, 0.0, 1.0)
        if noise_dropout > 0 and not preserve_symmetry:
            raise ValueError(f"noise_dropout needs preserve_symmetry=True; got noise_dropout={noise_dropout}")
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = checks.keep_codebooks_dim(keep_num_codebooks_dim, num_codebooks)
        self.dim = self.effective_codebook_dim if dim is None else dim
        checks.whole("dim", self.dim, 1)
        self.scale = scale
        self.allowed_dtypes = allowed_dtypes
        self.channel_first = channel_first
        self.return_indices = return_indices
        self.force_quantization_f32 = force_quantization_f32
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in, self.project_out = projections(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
        if orthogonal_rotation:
            if len(set(levels)) > 1:
                warnings.warn(
                    f"orthogonal_rotation mixes the channels, so their levels should be equal; got {list(levels)}",
                    UserWarning,
                    stacklevel=2,
                )
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(2 * [self.codebook_dim])))

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes (codebook_size, d) in the order of their indices, made anew at every call."""
        return self._indices_to_codes(torch.arange(self.codebook_size, device=self._levels.device))

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """z (..., d) to codes on the integer grid, over half the number of levels (section 3.1 of the paper)."""
        half_width = self._levels // 2
        steps = self._levels - 1
        reach = torch.minimum(steps * (1 + eps), steps + 0.9992) / 2  # past half a step more there is no level
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        middle = offset / reach
        bounded = (z + middle).clamp(-1.0, 1.0) if hard_clamp else (z + middle.atanh()).tanh()
        grid = bounded * reach - offset
        return (straight_through(grid, grid.round()) / half_width).to(z.dtype)

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """z (..., d) to codes 2 level / (L - 1) - 1, from -1 to 1."""
        steps = self._levels - 1
        bounded = z.clamp(-1.0, 1.0) if hard_clamp else z.tanh()
        position = steps * (bounded + 1) / 2 + 0.5
        return (straight_through(position, position.floor()) * (2.0 / steps) - 1.0).to(z.dtype)

    def quantize(self, z: Tensor) -> Tensor:
        """z (..., d) to its codes, with the straight-through gradient."""
        if self.preserve_symmetry:
            return self.symmetry_preserving_bound(z, hard_clamp=self.bound_hard_clamp)
        return self.bound(z, hard_clamp=self.bound_hard_clamp)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training, with noise_dropout: a random choice of the codes moved by up to half a unit, within -1 to 1."""
        if not self.training or self.noise_dropout == 0.0:
            return bounded_z
        chosen = torch.full_like(bounded_z, self.noise_dropout).bernoulli_().bool()
        offset = torch.rand_like(bounded_z) - 0.5
        return torch.where(chosen, bounded_z + offset, bounded_z).clamp(-1.0, 1.0)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Codes (..., d) to indices (...): int32, or int64 from 2^31 codes on; a NaN counts as level 0."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(f"zhat must have {self.codebook_dim} numbers a code; got shape {tuple(zhat.shape)}")
        zhat = zhat.to(torch.promote_types(zhat.dtype, torch.float32))
        if self.preserve_symmetry:
            levels = (zhat + 1.0) / (2.0 / (self._levels - 1))
        else:
            half_width = self._levels // 2
            levels = zhat * half_width + half_width
        return self._digits_to_indices(levels.round())

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        levels = self.indices_to_level_indices(indices)
        if self.preserve_symmetry:
            return levels * (2.0 / (self._levels - 1)) - 1.0
        half_width = self._levels // 2
        return (levels - half_width) / half_width

    def _codes_at(self, indices: Tensor) -> Tensor:
        """Indices (...) to codes (..., d), as `forward` gives them before `project_out`."""
        return self._rotate_back(self._indices_to_codes(indices))

    def _rotate_back(self, codes: Tensor) -> Tensor:
        return codes @ self.orthogonal_rot.to(codes.dtype).t() if self.orthogonal_rotation else codes

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The output of `forward` from its indices.

        Args:
            indices: (...), or (..., num_codebooks) with keep_num_codebooks_dim; int32 or int64.

        Returns:
            (..., dim); (B, dim, ...) with channel_first, or from indices of an image or video.
        """
        codes = self._codes_at(indices)
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        second = self.channel_first or indices.dim() >= 3 + self.keep_num_codebooks_dim
        return channels_back(project(self.project_out, codes), second)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantise z.

        Args:
            z: (..., dim); (B, dim, ...) with channel_first or with four or more dimensions. Any floating dtype.

        Returns:
            quantized: the shape and dtype of z, with the straight-through gradient.
            indices: the shape of z without the channels, and a last dimension num_codebooks with
                keep_num_codebooks_dim; int32, or int64 from 2^31 codes on; None with return_indices=False.

        Raises:
            TypeError, ValueError: z is no tensor, or dim is not where it should be.
        """
        checks.tensor("z", z)
        second = self.channel_first or z.dim() >= 4
        parts = self.project_in(channels_last("z", z, self.dim, second))
        parts = parts.unflatten(-1, (self.num_codebooks, self.codebook_dim))
        with autocast_off(z, self.force_quantization_f32):
            forced = self.force_quantization_f32 and parts.dtype not in self.allowed_dtypes
            rows = parts.float() if forced else parts
            if self.orthogonal_rotation:
                rows = rows @ self.orthogonal_rot.to(rows.dtype)
            codes = self.quantize(rows)
            indices = self.codes_to_indices(codes) if self.return_indices else None
            codes = self._rotate_back(self.maybe_apply_noise(codes))
        output = self.project_out(codes.flatten(-2).to(parts.dtype))
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        return channels_back(output, second), indices

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        return f"levels={self._levels.tolist()}, dim={self.dim}, num_codebooks={self.num_codebooks}"
