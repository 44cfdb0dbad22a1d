"""`fastvq info`: the report of fastvq.info."""

from __future__ import annotations

import argparse

from fastvq import info
from fastvq.data.errors import UserError
from fastvq.ops import FLOATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq info`."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--explain", nargs=4, metavar=("N", "K", "D", "DTYPE"), help="which backend a GPU uses at this size, and why"
    )


def _size(words: list[str]) -> tuple[int, int, int, str]:
    """N, K, D and dtype as they were typed.

    Raises:
        UserError: one is none.
    """
    *numbers, dtype = words
    for name, word in zip("NKD", numbers, strict=True):
        if not word.isdecimal() or int(word) == 0:
            raise UserError(f"--explain: {name} must be a whole number, at least 1; got {word}")
    names = [str(t).removeprefix("torch.") for t in FLOATS]
    if dtype not in names:
        raise UserError(f"--explain: DTYPE must be one of {', '.join(names)}; got {dtype}")
    N, K, D = map(int, numbers)
    return N, K, D, dtype


def run(args: argparse.Namespace) -> int:
    """Print the report, or the reasons."""
    try:
        print(info.explain(*_size(args.explain)) if args.explain else info.report(args.json))
    except ValueError as error:  # a setting in the environment that names what is not there
        raise UserError(str(error)) from error
    return 0
