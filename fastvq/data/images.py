"""One image, between a file and a tensor."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq.data.atomic import written_beside
from fastvq.data.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_image(path: Path, channels: int | None = None) -> Tensor:
    """Read an image file.

    Args:
        path: any format that Pillow reads; a camera's orientation tag is obeyed, transparency dropped, 16 bits
            reduced to 8.
        channels: 1 (grey) or 3 (RGB); None takes what the file has.

    Returns:
        (channels, H, W) uint8.

    Raises:
        DataError: the file is missing, is no image, is damaged, or is too large to be one (over 89 megapixels).
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened)
    except FileNotFoundError as error:
        raise DataError(f"image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"image {path} cannot be read: {_one_line(error)}") from error
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if channels is None:
        channels = 1 if image.mode in ("1", "L", "LA") else 3
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def write_image(path: Path, image: Tensor) -> None:
    """Write (1 or 3, H, W), uint8 or float in [0, 1], as a PNG, atomically."""
    with written_beside(path) as beside:
        to_pillow(image).save(beside, format="PNG", optimize=True)


def to_pillow(image: Tensor):  # type: ignore[no-untyped-def] # Pillow is imported only where it is used
    """The Pillow image of (1 or 3, H, W), uint8 or float in [0, 1]."""
    from PIL import Image

    pixels = to_bytes(image).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def to_bytes(image: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8, rounded to the nearest; uint8 as it is."""
    return image if image.dtype == torch.uint8 else image.clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)


def to_floats(image: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]; floats as they are."""
    return image.float() / 255.0 if image.dtype == torch.uint8 else image


def to_channels(image: Tensor, channels: int) -> Tensor:
    """(C, H, W) with 1 or 3 channels to as many as asked for: grey repeated, or the luma of ITU-R BT.601."""
    if image.shape[0] == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1).mul(to_floats(image)).sum(0, keepdim=True)
    return to_bytes(luma) if image.dtype == torch.uint8 else luma


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
