"""`fastvq train`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fastvq.cli.parser import add_device, device_of, positive_float, positive_int, seed
from fastvq.data import Images, UserError, load
from fastvq.data.sources import BUILT_IN
from fastvq.models import CONFIGS, VQVAEConfig
from fastvq.training import CheckpointError, TrainSettings, train
from fastvq.training import checkpoint as checkpoints

LARGEST_CROP = 64  # what is taken, of larger images, unless --crop says otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq train`."""
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder for checkpoints and metrics")
    parser.add_argument("--steps", type=positive_int, required=True, metavar="N", help="steps in all")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    parser.add_argument("--data", metavar="DATA", help="photos, digits, a folder of images, or a .npy file")
    parser.add_argument("--seed", type=seed, metavar="S", help="of weights, batches and codebook (default: 0)")
    parser.add_argument("--config", choices=CONFIGS, help="the model (default: photos for colour, digits for grey)")
    parser.add_argument("--codebook-size", type=positive_int, metavar="K", help="codes, instead of the config's")
    parser.add_argument("--crop", type=positive_int, metavar="PIXELS", help=f"side (default: {LARGEST_CROP} or less)")
    parser.add_argument("--batch-size", type=positive_int, metavar="B", help="crops a step (default: 16)")
    parser.add_argument("--learning-rate", type=positive_float, metavar="R", help="of Adam (default: 0.001)")
    parser.add_argument("--log-every", type=positive_int, metavar="N", help="steps between metrics (default: 50)")
    parser.add_argument("--save-every", type=positive_int, metavar="N", help="steps between checkpoints (default: 500)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Train, or go on."""
    device = device_of(args)
    if args.resume:
        settings, done = _resumed(args)
        if done >= args.steps:
            print(f"{args.out} is at step {done} already")
            return 0
        images = load(settings.data)
    else:
        if args.data is None:
            raise UserError("--data is required (photos, digits, a folder of images, or a .npy file)")
        if not checkpoints.is_free(args.out):
            raise UserError(f"--out {args.out} exists and is not an empty folder; --resume goes on with a run")
        images = load(args.data)
        settings = _settings(args, images)
    result = train(args.out, settings, images, args.steps, resume=args.resume, device=device)
    if result.interrupted:
        print(
            f"stopped at step {result.step}, saved; go on: fastvq train --out {args.out} --resume --steps {args.steps}"
        )
        return 130
    print(f"trained to step {result.step}: {result.checkpoint}")
    return 0


def _settings(args: argparse.Namespace, images: Images) -> TrainSettings:
    model = CONFIGS[args.config or ("photos" if images.channels == 3 else "digits")]
    if args.codebook_size is not None:
        model = dataclasses.replace(model, codebook_size=args.codebook_size)
    return TrainSettings(model=model, crop=_crop(args.crop, images, model), **_given(args))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given by name; the others keep their defaults."""
    names = ("data", "seed", "batch_size", "learning_rate", "log_every", "save_every")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "data" in given and given["data"] not in BUILT_IN:
        # A run can be resumed from another folder.
        given["data"] = str(Path(given["data"]).resolve())
    return given


def _crop(asked: int | None, images: Images, model: VQVAEConfig) -> int:
    if asked is not None:
        if asked % model.factor:
            raise UserError(f"--crop must be a multiple of {model.factor}; got {asked}")
        return asked
    smallest = min(min(image.shape[1:]) for image in images.train)
    return max(model.factor, min(LARGEST_CROP, smallest) // model.factor * model.factor)


def _resumed(args: argparse.Namespace) -> tuple[TrainSettings, int]:
    """The settings of the run, which the options may repeat but not change, and the step it is at."""
    saved = checkpoints.load(args.out)
    settings = saved.settings
    asked = _given(args) | ({"crop": args.crop} if args.crop is not None else {})
    for name, value in asked.items():
        if value != getattr(settings, name):
            option = f"--{name.replace('_', '-')}"
            raise CheckpointError(f"{option} {value} is not that of run {args.out}, {getattr(settings, name)}")
    if args.codebook_size not in (None, settings.model.codebook_size):
        raise CheckpointError(
            f"--codebook-size {args.codebook_size} is not that of run {args.out}, {settings.model.codebook_size}"
        )
    if args.config is not None and CONFIGS[args.config] != dataclasses.replace(
        settings.model, codebook_size=CONFIGS[args.config].codebook_size
    ):
        raise CheckpointError(f"--config {args.config} is not that of run {args.out}")
    return settings, saved.step
