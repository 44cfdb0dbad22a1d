"""A trained run, images, and a way to call the command line."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.cli import main
from fastvq.data import load
from fastvq.models import VQVAEConfig
from fastvq.training import TrainSettings, train

MODEL = VQVAEConfig(hidden=(6, 8), residual_blocks=0, code_dim=4, codebook_size=20)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pixels(tmp_path_factory) -> Path:
    """Ten RGB images of 20 x 24 pixels, as an array."""
    path = tmp_path_factory.mktemp("data") / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (10, 20, 24, 3), np.uint8))
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, pixels) -> Path:
    """A run of three steps on them."""
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = TrainSettings(data=str(pixels), model=MODEL, crop=16, batch_size=4, log_every=1)
    train(path, settings, load(str(pixels)), 3)
    return path


@pytest.fixture(scope="session")
def other_run(tmp_path_factory, pixels) -> Path:
    """A run of another codebook size."""
    path = tmp_path_factory.mktemp("runs") / "other"
    model = dataclasses.replace(MODEL, codebook_size=21)
    train(path, TrainSettings(data=str(pixels), model=model, crop=16, batch_size=4), load(str(pixels)), 1)
    return path


@pytest.fixture
def picture(tmp_path) -> Path:
    """An RGB picture of 19 x 33 pixels, no multiple of anything."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (33, 19, 3), np.uint8)).save(path)
    return path


@dataclass
class Answer:
    status: int
    out: str
    err: str


@pytest.fixture
def call(capsys) -> Callable[..., Answer]:
    """Run the command line in this process."""

    def run_command(*arguments: object) -> Answer:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Answer(status, *capsys.readouterr())

    return run_command
