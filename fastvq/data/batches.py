"""Batches of random crops, the same from the same seed, whose state can be saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.data.images import to_channels, to_floats


class CropBatches(Iterator[Tensor]):
    """An endless stream of batches: an image drawn at random, then a place in it; with replacement.

    A smaller image is padded with its border's pixels.

    Args:
        images: (C, H, W) each, uint8 or float in [0, 1].
        crop: height and width of a crop, in pixels.
        channels: 1 or 3, what every crop is turned into.
        batch_size: crops a batch.
        seed: of the generator.

    Yields:
        (batch_size, channels, crop, crop) float32 in [0, 1].
    """

    def __init__(self, images: Sequence[Tensor], crop: int, channels: int, batch_size: int, seed: int) -> None:
        self._images, self._crop, self._channels, self._batch_size = images, crop, channels, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> Tensor:
        chosen = torch.randint(len(self._images), (self._batch_size,), generator=self._generator).tolist()
        places = torch.rand(self._batch_size, 2, generator=self._generator, dtype=torch.float64).tolist()
        return torch.stack([self._cut(self._images[i], *place) for i, place in zip(chosen, places, strict=True)])

    @property
    def state(self) -> Tensor:
        """The state of the generator, uint8: with it the stream goes on exactly where it was."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def _cut(self, image: Tensor, down: float, right: float) -> Tensor:
        top = int(down * max(1, image.shape[1] - self._crop + 1))
        left = int(right * max(1, image.shape[2] - self._crop + 1))
        return crop_at(image, top, left, self._crop, self._channels)


def crop_at(image: Tensor, top: int, left: int, crop: int, channels: int) -> Tensor:
    """The crop (channels, crop, crop), float32 in [0, 1], of an image; padded where the image ends."""
    part = to_floats(to_channels(image[:, top : top + crop, left : left + crop], channels))
    below, beside = crop - part.shape[1], crop - part.shape[2]
    return F.pad(part[None], (0, beside, 0, below), mode="replicate")[0] if below or beside else part
