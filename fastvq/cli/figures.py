"""The pictures of a report, and the look of all plots, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fastvq.data.images import to_bytes, to_pillow
from fastvq.training.log import Row
from fastvq.training.metrics import CodebookUse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from fastvq.cli.profile import Point
    from fastvq.measure.device import Limits

INK, MUTED, PAPER = "#1d2433", "#8a93a3", "#ffffff"
TRAIN, HELD_OUT = "#9aa5b8", "#c2410c"

TILE = 300  # pixels; larger images are cropped, smaller ones enlarged by a whole number
COLUMNS = {True: 10, False: 6}  # of small images, of large ones
GAP, LABEL = 8, 26


def reconstruction_grid(originals: Sequence[Tensor], restored: Sequence[Tensor], label: str) -> bytes:
    """Each original over its reconstruction, (C, H, W) uint8, pixel for pixel; `label` stands over the lower row."""
    from PIL import Image, ImageDraw, ImageFont

    side = min(TILE, *(min(image.shape[1:]) for image in originals))
    scale = max(1, TILE // 3 // side)
    columns = originals[: COLUMNS[side < TILE // 2]]
    step = side * scale + GAP
    canvas = Image.new("RGB", (len(columns) * step - GAP, 2 * (step + LABEL) - GAP), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    for row, (name, images) in enumerate((("original", originals), (label, restored))):
        top = row * (step + LABEL)
        draw.text((1, top + 2), name, fill=INK, font=font)
        for column, image in enumerate(images[: len(columns)]):
            canvas.paste(_tile(image, side, scale), (column * step, top + LABEL))
    return _png(canvas)


def curves(rows: Sequence[Row]) -> bytes:
    """Reconstruction error, perplexity and dead codes over the steps."""
    from matplotlib.ticker import LogLocator, NullLocator

    canvas = figure(11.0, 3.1)
    error, perplexity, dead = canvas.subplots(1, 3)
    steps = [row.step for row in rows]
    error.plot(steps, [row.train_mse for row in rows], color=TRAIN, label="training")
    error.plot(steps, [row.held_out_mse for row in rows], color=HELD_OUT, label="held out")
    error.set_yscale("log")
    error.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    error.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    error.yaxis.set_minor_locator(NullLocator())
    error.legend(frameon=False, labelcolor=INK)
    perplexity.plot(steps, [row.train_perplexity for row in rows], color=TRAIN)
    perplexity.plot(steps, [row.held_out_perplexity for row in rows], color=HELD_OUT)
    perplexity.set_ylim(bottom=0)
    dead.plot(steps, [row.dead_codes for row in rows], color=TRAIN)
    dead.set_ylim(bottom=0)
    for axes, title in (
        (error, "Mean squared error"),
        (perplexity, "Perplexity"),
        (dead, "Codes not used in training"),
    ):
        dress(axes, title, "step")
    return render(canvas)


def codebook_usage(counts: Tensor) -> bytes:
    """How often each code occurs, the most frequent first, against an even use of all of them."""
    shares = np.sort(counts.double().numpy())[::-1] / max(1, int(counts.sum()))
    even, use = 100 / len(shares), CodebookUse.of(counts)
    canvas = figure(11.0, 2.9)
    axes = canvas.subplots()
    axes.bar(np.arange(len(shares)), 100 * shares, width=1.0, color=HELD_OUT, linewidth=0)
    axes.axhline(even, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.annotate(
        f"even use of all {len(shares)} codes",
        (len(shares) - 1, even),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        color=INK,
    )
    axes.set_xlim(-0.5, len(shares) - 0.5)
    title = f"Share of each code, in %: {use.perplexity:.0f} codes' worth of perplexity, {use.dead} unused"
    dress(axes, title, "codes, the most frequent first")
    return render(canvas)


DIMENSIONS = ("#c2410c", "#2563a8", "#4d7c4a", "#7a6a9b", "#a3791a", "#3b8686")  # a colour for each D


def profile_plots(points: Sequence[Point], limits: Limits) -> bytes:
    """Time, roofline, memory and second looks of `fastvq profile`, a line for each D."""
    canvas = figure(11.0, 7.4)
    (time, roof), (memory, looks) = canvas.subplots(2, 2)
    for number, dim in enumerate(dict.fromkeys(point.dim for point in points)):
        some = [point for point in points if point.dim == dim]
        sizes, colour = [point.codebook_size for point in some], DIMENSIONS[number % len(DIMENSIONS)]
        style = {"color": colour, "marker": "o", "markersize": 3.5, "label": f"D = {dim}"}
        time.plot(sizes, [point.p50_ms for point in some], **style)
        roof.plot([point.intensity for point in some], [point.gops for point in some], **style)
        memory.plot(sizes, [np.nan if p.peak_mib is None else max(p.peak_mib, 0.1) for p in some], **style)
        for shares, line in (([p.second_look for p in some], "-"), ([p.exact for p in some], ":")):
            looks.plot(sizes, [np.nan if s is None else 100 * s for s in shares], linestyle=line, **style)
    naive = {point.codebook_size: point.naive_mib for point in points}
    memory.plot(list(naive), list(naive.values()), color=MUTED, linestyle=(0, (4, 3)), label="naive")
    reach = np.array([1.0, max(point.intensity for point in points) * 2])
    top = max(limits.rates.values())
    roof.plot(reach, np.minimum(reach * limits.copy, top), color=INK, linewidth=1.0)
    for name, rate in limits.rates.items():
        roof.plot([max(rate / limits.copy, reach[0]), reach[1]], [rate, rate], color=INK, linewidth=1.0)
        roof.annotate(
            name, (reach[1], rate), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8.5, color=INK
        )
    for axes, title, label in (
        (time, "Milliseconds a search", "codes"),
        (roof, "Roofline: G operations/s under the device's measured limits", "operations for each byte moved"),
        (memory, "Peak memory in MiB", "codes"),
        (looks, "Rows in % that took a second look (line), and float64 (dots)", "codes"),
    ):
        axes.set_xscale("log", base=10 if axes is roof else 2)
        if axes is not looks:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        dress(axes, title, label)
    roof.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    looks.set_xlim(memory.get_xlim())
    looks.set_ylim(bottom=0)
    memory.legend(frameon=False, labelcolor=INK, fontsize=8.5)
    return render(canvas)


def _tile(image: Tensor, side: int, scale: int) -> Image:
    from PIL import Image as pillow

    # Not quite the middle: faces are in the upper half of a photograph.
    top, left = (image.shape[1] - side) // 4, (image.shape[2] - side) // 2
    tile = to_pillow(to_bytes(image)[:, top : top + side, left : left + side]).convert("RGB")
    return tile.resize((side * scale, side * scale), pillow.Resampling.NEAREST)


def figure(width: float, height: float) -> Figure:
    """An empty picture, in inches."""
    # Not pyplot: it would choose a window system and keep every figure alive.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def dress(axes: Axes, title: str, label: str) -> None:
    """Title, axis label and quiet lines, the same for every plot."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=10)
    axes.set_xlabel(label, color=MUTED, fontsize=9)
    axes.tick_params(which="both", colors=MUTED, labelsize=8.5, length=3)
    axes.grid(axis="y", color="#e6e9ef", linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color("#c9cfd9")


def render(picture: Figure) -> bytes:
    """The picture as PNG."""
    content = io.BytesIO()
    picture.savefig(content, format="png", dpi=160)
    return content.getvalue()


def _png(image: Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return content.getvalue()
