"""Measured rows: what machine and versions they are from, and the CSV they go to."""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastvq
from fastvq.backends import cpu
from fastvq.info import processor

Row = dict[str, Any]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def machine() -> dict[str, str]:
    """What a figure depends on beside its own columns: processor, instruction set, versions, day."""
    return {
        "cpu": processor(),
        "isa": "" if cpu.missing() else cpu.extension().instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastvq": fastvq.__version__,
        "faiss": _version("faiss-cpu"),
        "peer": _version("vector-quantize-pytorch"),
        "day": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `machine` has put into the rows, in a line; of several runs all that differs."""
    columns = {name: sorted({str(row[name]) for row in rows}) for name in ("cpu", "isa", "threads", "torch", "day")}
    cpu, isa, threads, version, days = (" or ".join(values) for values in columns.values())
    return f"{cpu} ({isa}), threads: {threads}, torch {version}; {days}."


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, all of them text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows, a line each, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def fill_table(path: Path, command: str, table: str) -> None:
    """Put a table into a page, between the mark that names the command which writes it and the next end of a table."""
    begin, end = f"<!-- table: {command} -->\n", "\n<!-- end of table -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{begin}{table}{end}{after}", encoding="utf-8")
