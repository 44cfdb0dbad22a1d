"""The metrics of a run: one CSV for the report, TensorBoard for the watching."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from fastvq.data.atomic import write_bytes


@dataclass(frozen=True)
class Row:
    """What is measured every `log_every` steps; errors in squared units of the [0, 1] range.

    `dead_codes` are those that no row of the training batches since the last row of metrics chose.
    """

    step: int
    images_per_second: float
    train_loss: float
    train_mse: float
    train_perplexity: float
    train_usage: float
    dead_codes: int
    held_out_mse: float
    held_out_perplexity: float
    held_out_usage: float


_COLUMNS = [field.name for field in fields(Row)]


class MetricsLog:
    """Writes RUN/metrics.csv and RUN/tensorboard; on resuming, what came after `start` is forgotten."""

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.csv"
        kept = [row for row in read_metrics(run) if row.step <= start]
        write_bytes(self._path, _lines([_COLUMNS, *(list(asdict(row).values()) for row in kept)]).encode())
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._board.close()

    def add(self, row: Row) -> None:
        """Append one row of metrics."""
        values = asdict(row)
        with self._path.open("a", newline="") as file:
            file.write(_lines([list(values.values())]))
        step = values.pop("step")
        for name, value in values.items():
            self._board.add_scalar(_tag(name), value, step)

    def add_images(self, originals: Tensor, reconstructions: Tensor, step: int) -> None:
        """Show (N, C, H, W) originals over their reconstructions."""
        self._board.add_image("held_out/original_over_reconstruction", _grid(originals, reconstructions), step)
        self._board.flush()


def read_metrics(run: Path) -> list[Row]:
    """The rows of RUN/metrics.csv in order; none without the file. A last line that a crash cut short is left out."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            try:
                values = {f.name: (int if f.type == "int" else float)(line[f.name]) for f in fields(Row)}
            except (TypeError, ValueError):
                continue
            rows.append(Row(**values))  # type: ignore[arg-type]
    return rows


def _lines(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _tag(name: str) -> str:
    for group in ("train", "held_out"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return f"train/{name}"


def _grid(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """(N, C, H, W) twice to one image (C, 2 H, N W)."""
    rows = [torch.cat(list(images), dim=-1) for images in (originals, reconstructions.clamp(0.0, 1.0))]
    return torch.cat(rows, dim=-2).cpu()
