"""`fastvq info`: the report of fastvq.info."""

from __future__ import annotations

import argparse

from fastvq import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq info`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    return info.main(["--json"] if args.json else [])
