"""Arguments: errors of one line, and the types that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import torch

from fastvq.data.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a UserError, one line, instead of the usage and a message."""

    def __init__(self, **settings: str) -> None:
        super().__init__(
            **settings,  # type: ignore[arg-type]
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        raise UserError(message)


def positive_int(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def seed(text: str) -> int:
    """A whole number that a generator takes."""
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^63 - 1; got {value}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return value


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run to use, and where to compute."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, written by fastvq train")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for.

    Raises:
        UserError: there is no such device here.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device found")
    return torch.device(args.device)
