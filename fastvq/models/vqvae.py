"""The VQ-VAE: an encoder, a codebook, a decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.models.blocks import Decoder, Encoder
from fastvq.models.config import VQVAEConfig
from fastvq.nn import VectorQuantize


class VQVAEOutput(NamedTuple):
    """What a forward pass gives: reconstruction (B, C, H, W), indices (B, h, w) int64, loss ()."""

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor


class VQVAE(nn.Module):
    """The reference model of "Neural Discrete Representation Learning" (van den Oord et al., 2017).

    Images are floats in [0, 1], (B, C, H, W), of any size: the model pads height and width to a multiple of
    `config.factor` with the border's pixels and crops its output. Inside, 0.5 is taken off.

    Args:
        config: the shape; by default that of `CONFIGS["photos"]`.
        quantizer: takes the place of `fastvq.VectorQuantize`: a module with its returns (quantized, indices, loss)
            for feature maps (B, D, h, w), its method `get_output_from_indices`, and its attribute `codebook`.
    """

    quantizer: Any  # a module with the interface above, which nn.Module does not tell

    def __init__(self, config: VQVAEConfig | None = None, *, quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config = config or VQVAEConfig()
        self.encoder = Encoder(config)
        self.quantizer = quantizer or VectorQuantize(
            dim=config.code_dim,
            codebook_size=config.codebook_size,
            decay=config.decay,
            commitment_weight=config.commitment_weight,
            threshold_ema_dead_code=config.threshold_ema_dead_code,
            kmeans_init=config.kmeans_init,
            accept_image_fmap=True,
            rotation_trick=False,
        )
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Encode, quantise and decode; in training mode the codebook learns from the batch.

        The loss is mean((reconstruction - images)^2) / config.data_variance, plus the quantiser's own
        (van den Oord et al., 2017, equation 3, with the codebook learnt by moving averages as in appendix A.1).

        Raises:
            TypeError: `images` is not of a floating dtype.
            ValueError: `images` is not (B, C, H, W) with the C of the configuration.
        """
        height, width = self._check(images).shape[-2:]
        quantized, indices, quantizer_loss = self.quantizer(self._latents(images))
        reconstruction = (self.decoder(quantized) + 0.5)[..., :height, :width]
        loss = F.mse_loss(reconstruction, images) / self.config.data_variance + quantizer_loss
        return VQVAEOutput(reconstruction, indices, loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes of images (B, C, H, W): indices (B, ceil(H / factor), ceil(W / factor)), int64.

        The codebook does not learn, whatever the mode.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        latents = self._latents(self._check(images))
        training = self.quantizer.training
        self.quantizer.eval()
        try:
            return self.quantizer(latents)[1]
        finally:
            self.quantizer.train(training)

    @torch.no_grad()
    def decode(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The images of codes: floats (B, C, h * factor, w * factor), within [0, 1].

        Args:
            indices: (B, h, w) int64, from 0 to codebook_size - 1.
            size: crop to this height and width.

        Raises:
            ValueError: `indices` has another shape, or holds a number that no code has.
        """
        if indices.dim() != 3:
            raise ValueError(f"indices must have shape (B, h, w); got {tuple(indices.shape)}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.config.codebook_size:
            raise ValueError(f"indices must be from 0 to {self.config.codebook_size - 1}")
        images = self.decoder(self.quantizer.get_output_from_indices(indices)).add(0.5).clamp(0.0, 1.0)
        return images if size is None else images[..., : size[0], : size[1]]

    def _check(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1]; got {images.dtype}")
        channels = self.config.in_channels
        if images.dim() != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
            raise ValueError(f"images must have shape (B, {channels}, H, W); got {tuple(images.shape)}")
        return images

    def _latents(self, images: Tensor) -> Tensor:
        rows, columns = (-images.shape[-2] % self.config.factor, -images.shape[-1] % self.config.factor)
        padded = F.pad(images, (0, columns, 0, rows), mode="replicate") if rows or columns else images
        return self.encoder(padded - 0.5)
