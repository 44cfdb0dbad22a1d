"""Images of every kind come in as (C, H, W) bytes, and go out as they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.data import DataError, read_image, write_image
from fastvq.data.images import to_bytes, to_channels, to_floats

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = RGB[..., 0]


@pytest.mark.parametrize(
    ("image", "channels", "expected"),
    [
        (Image.fromarray(RGB), None, RGB),
        (Image.fromarray(GREY), None, GREY[..., None]),
        (Image.fromarray(GREY), 3, np.repeat(GREY[..., None], 3, 2)),
        (Image.fromarray(np.dstack([RGB, GREY])), None, RGB),
        (Image.fromarray((GREY.astype(np.uint16) << 8) + 77), None, GREY[..., None]),
        (Image.fromarray(GREY > 128), None, np.where(GREY > 128, 255, 0)[..., None]),
    ],
    ids=["rgb", "grey", "grey as rgb", "rgba", "16 bits", "1 bit"],
)
def test_every_kind_of_image(tmp_path, image, channels, expected):
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", channels)
    assert read.dtype == torch.uint8
    assert np.array_equal(read.permute(1, 2, 0).numpy(), expected)


def test_the_orientation_tag_is_obeyed(tmp_path):
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (3, 7, 5)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path, channels):
    image = torch.from_numpy(RGB).permute(2, 0, 1)[:channels]
    write_image(tmp_path / "a.png", image)
    write_image(tmp_path / "b.png", to_floats(image))
    assert torch.equal(read_image(tmp_path / "a.png"), image)
    assert torch.equal(read_image(tmp_path / "b.png"), image)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_bytes_and_floats():
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_bytes(to_floats(every)), every)
    assert to_bytes(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]


def test_grey_is_the_luma():
    colour = torch.tensor([10, 100, 200], dtype=torch.uint8).view(3, 1, 1)
    assert to_channels(colour, 1).item() == round(0.299 * 10 + 0.587 * 100 + 0.114 * 200)
    assert torch.equal(to_channels(colour[:1], 3), colour[:1].expand(3, 1, 1))


def damaged_png(path):
    Image.fromarray(RGB).save(path)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("hello"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (damaged_png, "cannot be read"),
        (lambda path: path.mkdir(), "cannot be read"),
    ],
    ids=["missing", "text", "empty", "truncated", "folder"],
)
def test_what_is_no_image_is_refused_by_name(tmp_path, make, words):
    make(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"a\.png {words}") as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [200, 300])
def test_a_bomb_is_refused(tmp_path, monkeypatch, side):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    Image.new("L", (side, side)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "a.png")
