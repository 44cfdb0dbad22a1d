"""A model judged on whole images: the error, the use of the codebook, and the size of the token file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.data.images import to_bytes, to_channels, to_floats, to_pillow
from fastvq.data.token_file import TokenFile
from fastvq.models import VQVAE, fingerprint
from fastvq.training.metrics import CodebookUse, code_counts, mean_squared_error, psnr


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` finds.

    Attributes:
        images: how many.
        pixels: of all of them.
        mse: mean squared error over all pixels and channels, in squared units of the [0, 1] range, of the images as
            `fastvq decode` writes them, in 8 bits.
        image_mse: the same for each image.
        counts: how often each code occurs, (K,) int64.
        use: of the codebook.
        raw_bytes: the pixels, 8 bits a channel.
        png_bytes: the images as PNG files, one each.
        token_bytes: the images as one token file.
    """

    images: int
    pixels: int
    mse: float
    image_mse: tuple[float, ...]
    counts: Tensor
    use: CodebookUse
    raw_bytes: int
    png_bytes: int
    token_bytes: int

    @property
    def psnr(self) -> float:
        """Decibels."""
        return psnr(self.mse)

    def to_dict(self) -> dict[str, float | int | None]:
        """The numbers as JSON can hold them; the PSNR of a perfect reconstruction is None."""
        return {
            "images": self.images,
            "pixels": self.pixels,
            "mse": self.mse,
            "psnr_db": self.psnr if math.isfinite(self.psnr) else None,
            "perplexity": self.use.perplexity,
            "usage": self.use.usage,
            "dead_codes": self.use.dead,
            "raw_bytes": self.raw_bytes,
            "png_bytes": self.png_bytes,
            "token_bytes": self.token_bytes,
            "bits_per_pixel": 8 * self.token_bytes / self.pixels,
            "ratio_to_raw": self.raw_bytes / self.token_bytes,
            "ratio_to_png": self.png_bytes / self.token_bytes,
        }


def evaluate(model: VQVAE, images: Sequence[Tensor]) -> Evaluation:
    """Encode and restore each image, (C, H, W) with 1 or 3 channels, uint8 or float in [0, 1]; at least one."""
    channels, codebook_size = model.config.in_channels, model.config.codebook_size
    errors, elements, codes, sizes, png_bytes = [], [], [], [], 0
    for image in images:
        original = to_bytes(to_channels(image, channels))
        codes.append(encode_image(model, original))
        sizes.append((original.shape[1], original.shape[2]))
        restored = decode_image(model, codes[-1], sizes[-1])
        errors.append(mean_squared_error(original, restored))
        elements.append(original.numel())
        png_bytes += _png_size(original)
    counts = code_counts(torch.cat([c.flatten() for c in codes]), codebook_size)
    tokens = TokenFile(codes, sizes, channels, codebook_size, fingerprint(model))
    return Evaluation(
        images=len(images),
        pixels=sum(elements) // channels,
        mse=sum(e * n for e, n in zip(errors, elements, strict=True)) / sum(elements),
        image_mse=tuple(errors),
        counts=counts,
        use=CodebookUse.of(counts),
        raw_bytes=sum(elements),
        png_bytes=png_bytes,
        token_bytes=len(tokens.to_bytes()),
    )


def encode_image(model: VQVAE, image: Tensor) -> Tensor:
    """The codes (h, w) int64, on the CPU, of one image (C, H, W), uint8 or float in [0, 1]."""
    device = next(model.parameters()).device
    pixels = to_floats(to_channels(image, model.config.in_channels)).to(device)
    return model.encode(pixels[None])[0].cpu()


def decode_image(model: VQVAE, codes: Tensor, size: tuple[int, int]) -> Tensor:
    """The image (C, H, W) uint8, on the CPU, of codes (h, w), cropped to `size`."""
    device = next(model.parameters()).device
    return to_bytes(model.decode(codes[None].to(device), size)[0]).cpu()


def _png_size(image: Tensor) -> int:
    content = io.BytesIO()
    to_pillow(image).save(content, format="PNG", optimize=True)
    return content.tell()
