"""A run small enough to train in a blink."""

import pytest
import torch

from fastvq.data import Images
from fastvq.models import VQVAEConfig
from fastvq.training import TrainSettings


@pytest.fixture(autouse=True)
def _one_thread():
    # The models are small: a second thread would only wait, and on a busy machine for long.
    torch.set_num_threads(1)


@pytest.fixture
def settings() -> TrainSettings:
    model = VQVAEConfig(hidden=(6, 8), residual_blocks=1, residual_channels=4, code_dim=4, codebook_size=32)
    return TrainSettings(data="test", model=model, crop=16, batch_size=4, log_every=3, save_every=4)


@pytest.fixture
def images() -> Images:
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randint(256, (3, 24, 20), generator=generator, dtype=torch.uint8) for _ in range(5)]
    return Images(pictures[:3], pictures[3:], held_out_names=["a", "b"], channels=3)
