"""`fastvq encode`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.cli.parser import add_run, device_of
from fastvq.data import TokenFile, UserError, read_image
from fastvq.data.token_file import LARGEST_SIDE
from fastvq.models import fingerprint
from fastvq.training import load_model
from fastvq.training.evaluation import encode_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq encode`."""
    add_run(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files of any size")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.fvq", help="the token file")


def run(args: argparse.Namespace) -> int:
    """Write the codes of the images."""
    model, _ = load_model(args.run, device_of(args))
    if args.out.is_dir():
        raise UserError(f"-o {args.out} is a folder; a file is needed")
    if args.out.resolve() in {path.resolve() for path in args.images}:
        raise UserError(f"-o {args.out} is one of the images")
    images = [read_image(path, model.config.in_channels) for path in args.images]
    for path, image in zip(args.images, images, strict=True):
        if max(image.shape[1:]) > LARGEST_SIDE:
            raise UserError(f"image {path} has a side of more than {LARGEST_SIDE} pixels")
    tokens = TokenFile(
        codes=[encode_image(model, image) for image in images],
        sizes=[(image.shape[1], image.shape[2]) for image in images],
        channels=model.config.in_channels,
        codebook_size=model.config.codebook_size,
        fingerprint=fingerprint(model),
    )
    size = tokens.write(args.out)
    pixels = sum(image.shape[1] * image.shape[2] for image in images)
    print(
        f"{args.out}: {len(images)} image{'s' * (len(images) != 1)}, {size} bytes, {8 * size / pixels:.3f} bits a pixel"
    )
    return 0
