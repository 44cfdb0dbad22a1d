"""Arguments: errors of one line, and the types that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from fastvq.data.errors import UserError

Number = TypeVar("Number", int, float)


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
    return _number(text, int, lambda value: value >= 1, "a whole number, at least 1")


def seed(text: str) -> int:
    """A whole number that a generator takes."""
    return _number(text, int, lambda value: 0 <= value < 1 << 63, "a whole number from 0 to 2^63 - 1")


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0.0 < value < math.inf, "a number above 0")


def _number(text: str, kind: Callable[[str], Number], holds: Callable[[Number], bool], need: str) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"must be {need}; got {text}")
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
