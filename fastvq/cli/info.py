"""`fastvq info`: the report of fastvq.info."""

from __future__ import annotations

import argparse

from fastvq import info
from fastvq.data.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq info`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    try:
        print(info.report(args.json))
    except ValueError as error:  # a setting in the environment that names what is not there
        raise UserError(str(error)) from error
    return 0
