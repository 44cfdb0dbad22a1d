"""`fastvq decode`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.cli.outputs import outputs_in
from fastvq.cli.parser import add_run, device_of
from fastvq.data import TokenFile, write_image
from fastvq.models import fingerprint
from fastvq.training import load_model
from fastvq.training.evaluation import decode_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq decode`."""
    add_run(parser)
    parser.add_argument("tokens", type=Path, metavar="FILE.fvq", help="a token file of the same model")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the PNG files")


def run(args: argparse.Namespace) -> int:
    """Write the images of a token file, numbered in its order."""
    model, _ = load_model(args.run, device_of(args))
    tokens = TokenFile.read(args.tokens, fingerprint(model), model.config.factor)
    stems = [f"{args.tokens.stem}-{number:04d}" for number in range(1, len(tokens.codes) + 1)]
    outputs = outputs_in(args.out, stems, [args.tokens])
    for output, codes, size in zip(outputs, tokens.codes, tokens.sizes, strict=True):
        write_image(output, decode_image(model, codes, size))
        print(output)
    return 0
