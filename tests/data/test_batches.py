"""Batches: the same from the same seed, resumable, and really crops of the images."""

import pytest
import torch

from fastvq.data import CropBatches
from fastvq.data.batches import crop_at

RAMP = torch.arange(3 * 20 * 30, dtype=torch.float32).view(3, 20, 30) / 1800
IMAGES = [RAMP, (RAMP * 255).to(torch.uint8), RAMP[:1, :6, :9]]


def stream(seed: int = 3, images=IMAGES, channels: int = 3) -> CropBatches:
    return CropBatches(images, crop=8, channels=channels, batch_size=16, seed=seed)


def test_the_seed_decides():
    first, second, other = stream(), stream(), stream(seed=4)
    for _ in range(3):
        batch = next(first)
        assert torch.equal(batch, next(second))
        assert not torch.equal(batch, next(other))


def test_the_state_takes_up_where_it_was():
    first = stream()
    next(first)
    state = first.state.clone()
    expected = [next(first) for _ in range(3)]
    second = stream(seed=99)
    second.state = state
    assert all(torch.equal(next(second), batch) for batch in expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_floats_from_0_to_1(channels):
    batch = next(stream(channels=channels))
    assert batch.shape == (16, channels, 8, 8)
    assert batch.dtype == torch.float32
    assert batch.min() >= 0
    assert batch.max() <= 1


def test_every_place_is_reached_and_no_other():
    image = torch.arange(100, dtype=torch.float32).view(1, 10, 10) / 100
    batches = CropBatches([image], crop=8, channels=1, batch_size=200, seed=0)
    corners = set((next(batches)[:, 0, 0, 0] * 100).round().int().tolist())
    assert corners == {10 * row + column for row in range(3) for column in range(3)}


def test_a_small_image_is_padded_with_its_border():
    crop = crop_at(torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]), 0, 0, 4, 1)
    assert torch.equal(crop[0, 1], torch.tensor([0.3, 0.4, 0.4, 0.4]))
    assert torch.equal(crop[0, 3], crop[0, 1])
