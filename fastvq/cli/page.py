"""The report of a run: the pictures, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import importlib.resources
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq.cli.figures import codebook_usage, curves, reconstruction_grid
from fastvq.data import Images
from fastvq.data.atomic import write_bytes
from fastvq.data.images import to_bytes, to_channels
from fastvq.models import VQVAE
from fastvq.training import TrainSettings, evaluate
from fastvq.training.evaluation import decode_image, encode_image
from fastvq.training.log import Row
from fastvq.training.metrics import psnr

SHOWN = 10  # images of the grid and of the table


@dataclass(frozen=True)
class Timings:
    """This machine's medians, rows of `fastvq.cli.bench.search_table` and `step_table`, and the machine in words."""

    machine: str
    search: list[dict[str, Any]]
    step: list[dict[str, Any]]


def write_report(
    folder: Path, model: VQVAE, settings: TrainSettings, images: Images, rows: Sequence[Row], timings: Timings | None
) -> Path:
    """Write reconstructions.png, curves.png, codebook.png and report.html into `folder`; returns the last."""
    found = evaluate(model, images.held_out)
    # Of many, some from everywhere: neighbours are often of one class.
    chosen = range(0, found.images, max(1, found.images // SHOWN))[:SHOWN]
    shown = [to_bytes(to_channels(images.held_out[i], model.config.in_channels)) for i in chosen]
    restored = [decode_image(model, encode_image(model, image), (image.shape[1], image.shape[2])) for image in shown]
    numbers = found.to_dict()
    pictures = {
        "reconstructions": reconstruction_grid(
            shown, restored, f"restored from {numbers['bits_per_pixel']:.2f} bits a pixel"
        ),
        "curves": curves(rows) if rows else None,
        "codebook": codebook_usage(found.counts),
    }
    page = _template().render(
        found=numbers,
        codebook_size=model.config.codebook_size,
        table=[
            {
                "name": images.held_out_names[i],
                "height": image.shape[1],
                "width": image.shape[2],
                "psnr": psnr(found.image_mse[i]),
            }
            for i, image in zip(chosen, shown, strict=True)
        ],
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items() if picture},
        rows=rows,
        settings=settings,
        timings=timings,
        contenders={"naive_ms": "naive", "chunked_ms": "chunked", "peer_ms": "vector-quantize-pytorch"},
        versions=f"fastvq {fastvq.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )
    for name, picture in pictures.items():
        if picture is not None:
            write_bytes(folder / f"{name}.png", picture)
    path = folder / "report.html"
    write_bytes(path, page.encode())
    return path


def _template():  # type: ignore[no-untyped-def] # jinja2 is imported only where it is used
    from jinja2 import Environment, StrictUndefined

    source = importlib.resources.files("fastvq.cli").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)
