"""`python -m benchmarks.table`: write the measured ratios of benchmarks/results/cpu.csv into the README."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table: python -m benchmarks.table -->", "<!-- end of table -->"
TITLES = {"search": "Search", "step": "The training step of the layer: forward, backward, EMA update"}

Row = dict[str, str]


def ratio(rows: dict[tuple[str, str], Row], allocator: str, contender: str) -> str:
    """How many times as long a contender takes as fastvq under the same allocator."""
    row = rows.get((allocator, contender))
    if row is None:
        return "-"
    value = float(row["p50_ms"]) / float(rows[allocator, "fastvq"]["p50_ms"])
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def table(rows: list[Row], operation: str) -> str:
    """One table in Markdown: fastvq's milliseconds and memory, and the rivals' ratios."""
    shapes: dict[tuple[str, str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["operation"] == operation:
            shapes.setdefault((row["N"], row["K"], row["D"]), {})[row["allocator"], row["contender"]] = row
    lines = [
        f"**{TITLES[operation]}**, times as long as fastvq (with memory kept in brackets):",
        "",
        "| N, K, D | fastvq | naive | plain torch | vector-quantize-pytorch | peak memory: fastvq / naive |",
        "|---|---|---|---|---|---|",
    ]
    for shape, cells in shapes.items():
        own = cells["default", "fastvq"]
        rivals = [
            f"{ratio(cells, 'default', name)} ({ratio(cells, 'kept', name)})" for name in ("naive", "chunked", "peer")
        ]
        memory = f"{float(own['peak_mib']):.0f} / {float(cells['default', 'naive']['peak_mib']):.0f} MiB"
        lines.append(f"| {', '.join(shape)} | {float(own['p50_ms']):.2f} ms | {' | '.join(rivals)} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the marks."""
    with (ROOT / "benchmarks" / "results" / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    machine = (
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, fastvq {first['fastvq']}, "
        f"vector-quantize-pytorch {first['peer']}."
    )
    text = "\n\n".join([table(rows, "search"), table(rows, "step"), machine])
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
