"""Multi-scale residual quantisation, the tokenizer of VAR (Tian et al., 2024, arXiv:2404.02905)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvq.nn import checks
from fastvq.nn.channels import channels_back, channels_last
from fastvq.nn.stage_dropout import host_seed, shared_draw
from fastvq.nn.vector_quantize import VectorQuantize

Shape = tuple[int, ...]

_POOLS: tuple[Callable[..., Tensor], ...] = (
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
)


class _Phi(nn.Module):
    """A convolution mixed into its input."""

    def __init__(self, dim: int, spatial_dims: int, ratio: float) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](dim, dim, 3, padding=1)
        self.resi_ratio = float(abs(ratio))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, ...) moved by resi_ratio towards its convolution."""
        return x if self.resi_ratio <= 1e-8 else x.lerp(self.conv(x), self.resi_ratio)


class HierarchicalVQ(nn.Module):
    """Quantise a map at one resolution after the other, each what the coarser ones have left.

    A level pools what is left to its shape, quantises that, interpolates back to the full shape and mixes in a
    convolution. Takes the place of `vector_quantize_pytorch.HierarchicalVQ` 1.32.0: the same arguments, defaults,
    returns and state_dict.

    Args:
        dim: channels of the input.
        codebook_size: K, or that of each level.
        scales: the shape of each level, none smaller than the one before; an int stands for all spatial dimensions.
        shared_codebook: one codebook for all levels.
        channel_first: the input is (B, dim, ...), else (B, ..., dim).
        sync_codebook, decay, commitment_weight, rotation_trick, kmeans_init, kmeans_iters, threshold_ema_dead_code,
            stochastic_sample_codes, sample_codebook_temp, orthogonal_reg_weight, orthogonal_reg_max_codes,
            orthogonal_reg_active_codes_only: of `VectorQuantize`.
        quant_resi: how much of the convolution is mixed in, 0 to 1.
        share_quant_resi: how many convolutions the levels share; 0 or less gives each its own.
        nested_dropout: in training, the probability that the finest levels are left out of the output; 0 to 1.
        nested_dropout_min_levels: levels that always stay.
        accept_image_fmap: maps have two spatial dimensions.
        accept_3d_fmap: maps have three; with neither, one.

    Attributes:
        vq, vqs: the shared quantiser, or those of the levels; the other is None.
        phi_shared, phi_levels: the convolution, or those of the levels; the other is None.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ) -> None:
        super().__init__()
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap and accept_3d_fmap exclude each other; got both")
        checks.number("nested_dropout", nested_dropout, 0.0, 1.0)
        checks.whole("nested_dropout_min_levels", nested_dropout_min_levels, 1)
        self.spatial_dims = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        self.level_shapes = tuple(self._shape("every one of scales", scale) for scale in scales)
        self.num_levels = len(self.level_shapes)
        if not self.level_shapes:
            raise ValueError(f"scales must name at least one level; got {scales!r}")
        if any(a > b for pair in itertools.pairwise(self.level_shapes) for a, b in zip(*pair, strict=True)):
            raise ValueError(f"scales must not decrease; got {list(self.level_shapes)}")
        sizes = [codebook_size] * self.num_levels if isinstance(codebook_size, int) else codebook_size
        self.codebook_sizes = tuple(sizes)
        if len(self.codebook_sizes) != self.num_levels:
            raise ValueError(f"codebook_size must name {self.num_levels} levels; got {self.codebook_sizes}")
        if shared_codebook and len(set(self.codebook_sizes)) > 1:
            raise ValueError(f"codebook_size must be one number with shared_codebook; got {self.codebook_sizes}")
        self.dim = dim
        self.channel_first = channel_first
        self.scales = tuple(scales)
        self.nested_dropout = nested_dropout
        self.nested_dropout_min_levels = nested_dropout_min_levels
        books = [
            VectorQuantize(
                dim,
                size,
                decay=decay,
                commitment_weight=commitment_weight,
                rotation_trick=rotation_trick,
                kmeans_init=kmeans_init,
                kmeans_iters=kmeans_iters,
                threshold_ema_dead_code=threshold_ema_dead_code,
                stochastic_sample_codes=stochastic_sample_codes,
                sample_codebook_temp=sample_codebook_temp,
                orthogonal_reg_weight=orthogonal_reg_weight,
                orthogonal_reg_max_codes=orthogonal_reg_max_codes,
                orthogonal_reg_active_codes_only=orthogonal_reg_active_codes_only,
                sync_codebook=sync_codebook,
            )
            for size in self.codebook_sizes[: 1 if shared_codebook else None]
        ]
        self.vq = books[0] if shared_codebook else None
        self.vqs = None if shared_codebook else nn.ModuleList(books)
        shared = share_quant_resi == 1
        count = self.num_levels if share_quant_resi <= 0 else min(self.num_levels, int(share_quant_resi))
        convolutions = [_Phi(dim, self.spatial_dims, quant_resi) for _ in range(1 if shared else count)]
        self.phi_shared = convolutions[0] if shared else None
        self.phi_levels = None if shared else nn.ModuleList(convolutions)

    def _shape(self, name: str, scale: int | Sequence[int]) -> Shape:
        shape = (scale,) * self.spatial_dims if isinstance(scale, int) else tuple(scale)
        if len(shape) != self.spatial_dims or any(size < 1 for size in shape):
            raise ValueError(f"{name} must be a size, or {self.spatial_dims} of them, at least 1; got {scale}")
        return shape

    def get_vq(self, level_index: int) -> VectorQuantize:
        """The quantiser of a level."""
        vq = self.vqs[level_index] if self.vqs is not None else self.vq
        assert isinstance(vq, VectorQuantize)
        return vq

    def choose_phi(self, level_index: int) -> _Phi:
        """The convolution of a level."""
        phi: nn.Module | None = self.phi_shared
        if self.phi_levels is not None:
            position = level_index / max(self.num_levels - 1, 1)
            phi = self.phi_levels[round(position * (len(self.phi_levels) - 1))]
        assert isinstance(phi, _Phi)
        return phi

    def pool_residual(self, t: Tensor, level_shape: Shape, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The mean of t (B, dim, ...) in each cell of a level, where mask (B, ...) is True; which cells have any."""
        pool_to = _POOLS[self.spatial_dims - 1]
        if mask is None:
            return pool_to(t, level_shape), None
        kept = mask.unsqueeze(1)
        share = pool_to(kept.to(t.dtype), level_shape)
        total = pool_to(torch.where(kept, t, 0.0), level_shape)
        return total / share.clamp(min=1e-6), share.squeeze(1) > 0

    def upsample_to_full(self, q: Tensor, full_shape: Shape, level_index: int) -> Tensor:
        """The codes (B, dim, ...) of a level, interpolated to the full shape and through the level's convolution."""
        if tuple(q.shape[2:]) != tuple(full_shape):
            mode = ("linear", "bilinear", "trilinear")[self.spatial_dims - 1]
            q = functional.interpolate(q, size=full_shape, mode=mode, align_corners=False)
        mixed: Tensor = self.choose_phi(level_index)(q)
        return mixed

    def sample_nested_cutoff(self, device: torch.device) -> int | Tensor | None:
        """The last level of the output in this step, the same in every process; None when all levels are in it.

        An int on the CPU; elsewhere, and in compiled graphs, a tensor () for which nobody waits.
        """
        first, levels = self.nested_dropout_min_levels - 1, self.num_levels
        if not self.training or self.nested_dropout <= 0 or first >= levels - 1:
            return None
        seed = host_seed(device)
        if seed is not None:
            generator = random.Random(seed)
            return None if generator.random() >= self.nested_dropout else generator.randrange(first, levels - 1)
        drops = shared_draw(1 << 24, device) < self.nested_dropout * (1 << 24)
        return torch.where(drops, first + shared_draw(levels - 1 - first, device), levels - 1)

    def _full_mask(self, mask: Tensor | None, lens: Tensor | None, places: Shape) -> Tensor | None:
        if mask is not None and lens is not None:
            raise ValueError("mask and lens say the same thing: give one of them; got both")
        if lens is not None:
            if self.spatial_dims != 1:
                raise ValueError(f"lens needs maps of one spatial dimension; this layer has {self.spatial_dims}")
            checks.tensor("lens", lens)
            checks.shape("lens", lens, places[:1])
            return torch.arange(places[1], device=lens.device) < lens.unsqueeze(1)
        if mask is not None:
            checks.tensor("mask", mask)
            checks.dtype("mask", mask, (torch.bool,))
            checks.shape("mask", mask, places)
        return mask

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: float | None = None,
        return_cutoff: bool = False,
    ) -> tuple[object, ...]:
        """Quantise x; in training, learn from it.

        Args:
            x: (B, dim, ...), or (B, ..., dim) without channel_first, with the spatial dimensions of the constructor.
            indices: must be None; see `get_output_from_indices`.
            mask: (B, ...) bool; places where it is False give zeros and take no part.
            lens: (B,) integers, the same by the number of leading places to keep; one spatial dimension only.
            sample_codebook_temp: of `VectorQuantize.forward`.
            return_cutoff: return what `sample_nested_cutoff` has drawn too.

        Returns:
            quantized: the shape and dtype of x.
            indices: a tuple, for each level (B, *its shape), int64; -1 in cells that are masked throughout.
            loss: (), the mean of the levels' commitment losses, of those in the output; 0 in eval mode.

        Raises:
            TypeError, ValueError: an argument of the wrong type or shape.
        """
        if indices is not None:
            raise ValueError("indices must be None: get_output_from_indices decodes them")
        rows = channels_last("x", x, self.dim, self.channel_first)
        if x.dim() != self.spatial_dims + 2:
            raise ValueError(f"x must have {self.spatial_dims} spatial dimensions; got {tuple(x.shape)}")
        kept = self._full_mask(mask, lens, tuple(rows.shape[:-1]))
        residual = rows.movedim(-1, 1)
        full_shape = tuple(residual.shape[2:])
        parts, all_indices, losses = [], [], []
        for level, shape in enumerate(self.level_shapes):
            pooled, level_mask = self.pool_residual(residual, shape, kept)
            codes, found, loss = self.get_vq(level)(
                pooled.flatten(2).transpose(1, 2),
                mask=None if level_mask is None else level_mask.flatten(1),
                sample_codebook_temp=sample_codebook_temp,
            )
            part = self.upsample_to_full(codes.transpose(1, 2).unflatten(2, shape), full_shape, level)
            residual = residual - part
            parts.append(part)
            all_indices.append(found.unflatten(1, shape))
            losses.append(loss)
        cutoff = self.sample_nested_cutoff(x.device)
        output, loss = self._up_to(cutoff, parts, losses)
        if kept is not None:
            output = torch.where(kept.unsqueeze(1), output, 0.0)
        output = channels_back(output.movedim(1, -1), self.channel_first)
        returned = output, tuple(all_indices), loss
        return (*returned, cutoff) if return_cutoff else returned

    def _up_to(self, cutoff: int | Tensor | None, parts: list[Tensor], losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of the parts, and the mean of the losses, of the levels up to the cutoff."""
        if isinstance(cutoff, Tensor):
            stays = torch.arange(self.num_levels, device=cutoff.device) <= cutoff
            kept = [torch.where(stay, part, 0.0) for stay, part in zip(stays.unbind(), parts, strict=True)]
            return sum(kept[1:], kept[0]), torch.where(stays, torch.stack(losses), 0.0).sum() / stays.sum()
        last = self.num_levels if cutoff is None else cutoff + 1
        return sum(parts[1:last], parts[0]), torch.stack(losses[:last]).mean()

    def get_output_from_indices(
        self, indices: Sequence[Tensor], full_shape: int | Sequence[int] | None = None
    ) -> Tensor:
        """The output of `forward` from its indices.

        Args:
            indices: for each level (B, *its shape); -1 gives zeros.
            full_shape: of the map, an int for all spatial dimensions; None takes that of the last level.

        Returns:
            (B, dim, *full_shape), or (B, *full_shape, dim) without channel_first.

        Raises:
            TypeError, ValueError: indices of the wrong type or number.
        """
        if not isinstance(indices, tuple | list) or len(indices) != self.num_levels:
            raise ValueError(f"indices must be a tuple of {self.num_levels} levels; got {type(indices).__name__}")
        full = self.level_shapes[-1] if full_shape is None else self._shape("full_shape", full_shape)
        parts = []
        for level, (found, shape) in enumerate(zip(indices, self.level_shapes, strict=True)):
            checks.shape(f"indices[{level}]", found, (*found.shape[:1], *shape))
            flat = found.flatten(1)
            codes = self.get_vq(level).get_output_from_indices(flat)
            codes = codes.to(self.choose_phi(level).conv.weight.dtype)
            parts.append(self.upsample_to_full(codes.transpose(1, 2).unflatten(2, shape), full, level))
        return channels_back(sum(parts[1:], parts[0]).movedim(1, -1), self.channel_first)

    def extra_repr(self) -> str:
        """The arguments that matter most, for `print`."""
        return f"dim={self.dim}, codebook_sizes={self.codebook_sizes}, level_shapes={self.level_shapes}"
