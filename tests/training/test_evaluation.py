"""The evaluation: what it says of the images is so."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from fastvq.data import TokenFile, write_image
from fastvq.models import VQVAE, fingerprint
from fastvq.training import evaluate
from fastvq.training.evaluation import decode_image, encode_image


@pytest.fixture
def model(settings):
    return VQVAE(dataclasses.replace(settings.model, kmeans_init=False)).eval()


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(256, size, generator=generator, dtype=torch.uint8) for size in ((3, 17, 22), (3, 9, 40))]


def test_every_number(model, pictures, tmp_path):
    model.quantizer.codebook = torch.randn(32, 4)
    found = evaluate(model, pictures)
    restored = [decode_image(model, encode_image(model, p), tuple(p.shape[1:])) for p in pictures]
    pairs = list(zip(pictures, restored, strict=True))
    differences = torch.cat([((a.double() - b.double()) / 255).flatten() for a, b in pairs])
    codes = [encode_image(model, p) for p in pictures]
    assert found.images == 2
    assert found.pixels == 17 * 22 + 9 * 40
    assert found.mse == pytest.approx(float(differences.square().mean()))
    assert found.image_mse[1] == pytest.approx(float(((pairs[1][0].double() - pairs[1][1]) / 255).square().mean()))
    assert found.counts.sum() == 5 * 6 + 3 * 10
    assert found.counts.tolist() == torch.bincount(torch.cat([c.flatten() for c in codes]), minlength=32).tolist()
    assert found.raw_bytes == 3 * found.pixels
    sizes = [tuple(p.shape[1:]) for p in pictures]
    assert found.token_bytes == TokenFile(codes, sizes, 3, 32, fingerprint(model)).write(tmp_path / "a.fvq")
    for number, picture in enumerate(pictures):
        write_image(tmp_path / f"{number}.png", picture)
    assert found.png_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.png"))
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["ratio_to_png"] == pytest.approx(found.png_bytes / found.token_bytes)
    assert numbers["ratio_to_raw"] == pytest.approx(found.raw_bytes / found.token_bytes)
    assert numbers["bits_per_pixel"] == pytest.approx(8 * found.token_bytes / found.pixels)


def test_images_are_turned_into_the_models_channels(model, pictures, tmp_path):
    grey = pictures[0][:1]
    assert evaluate(model, [grey]).mse == evaluate(model, [grey.expand(3, -1, -1)]).mse
    assert evaluate(model, [grey / 255.0]).mse == evaluate(model, [grey]).mse


def test_a_perfect_reconstruction_is_json_too(model, monkeypatch):
    monkeypatch.setattr("fastvq.training.evaluation.decode_image", lambda model, codes, size: torch.zeros(3, *size))
    found = evaluate(model, [torch.zeros(3, 8, 8, dtype=torch.uint8)])
    assert found.to_dict()["psnr_db"] is None
    assert found.mse == 0.0


def test_decoded_images_are_8_bit_pictures(model, pictures, tmp_path):
    write_image(tmp_path / "a.png", decode_image(model, encode_image(model, pictures[1]), (9, 40)))
    with Image.open(tmp_path / "a.png") as image:
        assert (image.size, image.mode) == ((40, 9), "RGB")
