"""`fastvq report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastvq.cli.page import write_report
from fastvq.cli.parser import add_run, device_of
from fastvq.data import UserError, load
from fastvq.training import load_model
from fastvq.training.log import read_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq report`."""
    add_run(parser)
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder for the report (default: RUN)")


def run(args: argparse.Namespace) -> int:
    """Draw the run."""
    model, settings = load_model(args.run, device_of(args))
    folder = args.out or args.run
    if folder.exists() and not folder.is_dir():
        raise UserError(f"-o {folder} is not a folder")
    print(write_report(folder, model, settings, load(settings.data), read_metrics(args.run), timings=None))
    return 0
