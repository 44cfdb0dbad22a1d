"""`python -m benchmarks.search_parts`: where the time of a CPU search goes, by the sampling profiler `perf`.

One thread, some ninety seconds on a quiet machine. Writes benchmarks/results/search_parts.csv and the table of
docs/certified-search.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.table import markdown
from fastvq.cli.bench import SEARCH_SHAPES
from fastvq.measure.contenders import search_work
from fastvq.measure.data import Shape
from fastvq.measure.device import limits
from fastvq.measure.table import Row, fill_table, machine, machine_line, read_csv, write_csv
from fastvq.measure.timing import Work

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "search_parts.csv"
PAGE = ROOT / "docs" / "certified-search.md"
EXTENSION = "_cpu."  # in the name of the shared object
SECONDS = 3.0  # of samples, for one shape
PER_SECOND = 1999

# The functions of csrc/cpu that make up a part; the first part with a match, in the extension, is meant.
PARTS = {
    "screen": r"::screen(_int8)?\b",
    "candidates": r"int8_candidates|group_scores|float_candidates|GroupScores",
    "rows": r"::(centre|quantise|transform_row|transpose_rows|move)\b",
    "errands": r"Errands::step",
    "codes": r"packed_codebook|PackedCodebook|::(measure|(screen|move)_(codes|group)|(quantise|transform)_codes)\b",
    "rest": "",
}
OUTSIDE = "outside"  # Python, torch, the kernel of the system


def part_of(shared_object: str, symbol: str) -> str:
    """The part of a search that a function belongs to."""
    if EXTENSION not in shared_object:
        return OUTSIDE
    return next(part for part, pattern in PARTS.items() if re.search(pattern, symbol))


def shares(report: str) -> dict[str, float]:
    """The share of each part, from what `perf report` prints of overheads, shared objects and symbols.

    Raises:
        ValueError: the report has no samples of the extension.
    """
    found = dict.fromkeys([*PARTS, OUTSIDE], 0.0)
    for line in report.splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) == 3 and cells[0].endswith("%"):
            found[part_of(cells[1], cells[2])] += float(cells[0].rstrip("%"))
    total = sum(found.values())
    if total - found[OUTSIDE] <= 0:
        raise ValueError(f"report must have samples of {EXTENSION}*; got {report[:200]!r}")
    return {part: share / total for part, share in found.items()}


def peak() -> float:
    """G operations a second from registers: int8 dot products, or float32 where there are none."""
    return max(limits(torch.device("cpu")).rates.values())


def cpu_milliseconds(work: Work) -> float:
    """CPU time of one call, the mean of those of a second."""
    calls, start = 0, time.process_time()
    while time.process_time() < start + 1:
        work.call()
        calls += 1
    return (time.process_time() - start) / calls * 1e3


def measured(shape: Shape) -> Row:
    """CPU time of a search of an unchanged codebook, that of its int8 products alone, and the shares of its parts."""
    N, K, D = shape
    work = search_work("fastvq", shape, changed=False)
    work.turn()
    rate, milliseconds = peak(), cpu_milliseconds(work)
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "perf.data"))
        options = ["-q", "-e", "cpu-clock", "-F", str(PER_SECOND), "-p", str(os.getpid()), "-o", data]
        with subprocess.Popen(["perf", "record", *options, "--", "sleep", str(SECONDS)]) as sampling:
            while sampling.poll() is None:
                work.call()
        if sampling.returncode:
            raise RuntimeError(f"perf record ended with {sampling.returncode}")
        printed = subprocess.run(
            ["perf", "report", "-i", data, "--stdio", "--no-children", "-F", "overhead,dso,symbol", "-t", "\t"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    rate, milliseconds = (rate + peak()) / 2, (milliseconds + cpu_milliseconds(work)) / 2
    row: Row = {"N": N, "K": K, "D": D, "ms": f"{milliseconds:.4g}", "dots_ms": f"{2 * N * K * D / rate / 1e6:.4g}"}
    row |= {part: f"{share:.4f}" for part, share in shares(printed).items()}
    return row | {"threads": 1} | machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, times in milliseconds and shares in percent."""
    parts = [*PARTS, OUTSIDE]
    lines = []
    for row in rows:
        total, dots = float(row["ms"]), float(row["dots_ms"])
        cells = [", ".join(str(row[name]) for name in "NKD"), f"{total:.3g} ms", f"{dots:.3g} ms, {dots / total:.0%}"]
        lines.append(cells + [f"{float(row[part]):.1%}" for part in parts])
    return markdown(["N, K, D", "search", "its dot products alone", *parts], lines) + f"\n\n{machine_line(rows)}"


def main() -> int:
    """Measure every shape, write the rows and the table."""
    if shutil.which("perf") is None:
        print("perf is not there: it comes with the tools of the Linux kernel", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    write_csv(RESULTS, [measured(shape) for shape in tqdm(SEARCH_SHAPES, unit="shape")])
    fill_table(PAGE, "python -m benchmarks.search_parts", table(read_csv(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
