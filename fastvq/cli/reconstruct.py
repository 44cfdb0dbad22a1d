"""`fastvq reconstruct`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.cli.outputs import outputs_in
from fastvq.cli.parser import add_run, device_of
from fastvq.data import read_image, write_image
from fastvq.training import load_model
from fastvq.training.evaluation import decode_image, encode_image
from fastvq.training.metrics import mean_squared_error, psnr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq reconstruct`."""
    add_run(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files of any size")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the PNG files")


def run(args: argparse.Namespace) -> int:
    """Write each image as the model restores it."""
    model, _ = load_model(args.run, device_of(args))
    outputs = outputs_in(args.out, [path.stem for path in args.images], args.images)
    images = [read_image(path, model.config.in_channels) for path in args.images]
    for image, output in zip(images, outputs, strict=True):
        restored = decode_image(model, encode_image(model, image), (image.shape[1], image.shape[2]))
        write_image(output, restored)
        print(f"{output}: PSNR {psnr(mean_squared_error(image, restored)):.2f} dB")
    return 0
