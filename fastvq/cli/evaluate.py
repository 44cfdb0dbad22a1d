"""`fastvq evaluate`."""

from __future__ import annotations

import argparse
import json

from fastvq.cli.parser import add_run, device_of
from fastvq.data import load
from fastvq.training import Evaluation, evaluate, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq evaluate`."""
    add_run(parser)
    parser.add_argument("--data", metavar="DATA", help="photos, digits, a folder or a .npy file (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what the held-out images of the data say."""
    model, settings = load_model(args.run, device_of(args))
    found = evaluate(model, load(args.data or settings.data).held_out)
    print(json.dumps(found.to_dict(), indent=2) if args.json else render(found))
    return 0


def render(found: Evaluation) -> str:
    """The evaluation as a person reads it."""
    codebook_size = found.counts.numel()
    lines = {
        "held-out images": f"{found.images}, {found.pixels:,} pixels",
        "MSE": f"{found.mse:.6f} (of the [0, 1] range, squared)",
        "PSNR": f"{found.psnr:.2f} dB",
        "perplexity": f"{found.use.perplexity:.1f} of {codebook_size} codes",
        "usage": f"{100 * found.use.usage:.1f} % ({found.use.dead} codes unused)",
        "token file": f"{found.token_bytes:,} bytes, {8 * found.token_bytes / found.pixels:.3f} bits a pixel",
        "against raw pixels": f"{found.raw_bytes / found.token_bytes:.1f} times smaller than {found.raw_bytes:,} bytes",
        "against PNG": f"{found.png_bytes / found.token_bytes:.1f} times smaller than {found.png_bytes:,} bytes",
    }
    return "\n".join(f"{name:<20}{value}" for name, value in lines.items())
