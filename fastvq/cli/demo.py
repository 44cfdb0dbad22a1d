"""`fastvq demo`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from fastvq.cli import bench
from fastvq.cli.evaluate import render
from fastvq.cli.page import Timings, write_report
from fastvq.cli.parser import add_device, device_of, positive_int, seed
from fastvq.data import UserError, load
from fastvq.models import CONFIGS
from fastvq.training import TrainSettings, evaluate, load_model, train
from fastvq.training import checkpoint as checkpoints
from fastvq.training.log import read_metrics

STEPS = 2400  # some two minutes on two cores
PACKAGES = ("matplotlib.figure", "jinja2")  # of the report: better missed now than after the training
SHAPES = [(16384, 1024, 64), (65536, 1024, 8), (256, 1024, 64)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq demo`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the run and its report")
    parser.add_argument("--steps", type=positive_int, default=STEPS, metavar="N", help=f"(default: {STEPS})")
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="of weights, batches and codebook (default: 0)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Train on the photographs, or go on where it was stopped, and write the report."""
    device = device_of(args)
    for name in PACKAGES:
        importlib.import_module(name)
    settings = TrainSettings(data="photos", model=CONFIGS["photos"], crop=64, seed=args.seed, save_every=200)
    images = load(settings.data)
    resume = checkpoints.exists(args.out)
    if not resume and not checkpoints.is_free(args.out):
        raise UserError(f"--out {args.out} exists and is not an empty folder")
    result = train(args.out, settings, images, args.steps, resume=resume, device=device)
    if result.interrupted:
        print(f"stopped at step {result.step}, saved; the same command goes on")
        return 130
    model, _ = load_model(args.out, device)
    print(render(evaluate(model, images.held_out)))
    print("timing fastvq against plain PyTorch ...", flush=True)
    timings = Timings(bench.machine_line(), bench.search_table(SHAPES, 1.0), bench.step_table(SHAPES, 1.0))
    print(write_report(args.out, model, settings, images, read_metrics(args.out), timings))
    return 0
