"""`python -m benchmarks.search_ways`: measure which way a CPU search is fastest by the shape of the codebook.

Writes benchmarks/results/search_ways.csv and, from it, csrc/cpu/search_way_table.h; half a minute on a quiet machine.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastvq.backends import cpu
from fastvq.data.atomic import write_bytes
from fastvq.measure.data import Shape, draw
from fastvq.measure.table import Row, machine, read_csv, write_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "search_ways.csv"
TABLE = ROOT / "csrc" / "cpu" / "search_way_table.h"

WIDTHS = tuple(1 << i for i in range(2, 11))  # D
SIZES = tuple(1 << i for i in range(4, 17, 2))  # K
FEW_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_ELEMENTS = 1 << 24  # K D of what is measured; larger codebooks take the way of the largest of their width
MANY_ROWS = 2048
SECONDS = 0.3  # for a pair of ways


def fastest(ways: Sequence[str], shape: Shape) -> str:
    """The way with the least median time, the calls taken in turn; the first, unless another is faster by 2 %."""
    x, codebook = draw(shape)

    def seconds(way: str) -> float:
        start = time.perf_counter()
        cpu.search_by(way, x, codebook)
        return time.perf_counter() - start

    first = {way: min(seconds(way), seconds(way)) for way in ways}
    rounds = max(5, min(99, round(SECONDS / sum(first.values()))))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _, way in itertools.product(range(rounds), ways):
        times[way].append(seconds(way))
    medians = {way: statistics.median(values) * (1 if way == ways[0] else 1.02) for way, values in times.items()}
    return min(ways, key=medians.__getitem__)


def measured(k: int, d: int) -> Row:
    """The fastest ways for one codebook."""
    few = 0
    for n in FEW_ROWS:
        if fastest(("kept", "few"), (n, k, d)) == "kept":
            break
        few = n
    many = fastest(("int8", "float32"), (MANY_ROWS if k * d <= 1 << 20 else 256, k, d))
    return {
        "K": k,
        "D": d,
        "few_rows": few,
        "int8": int(many == "int8"),
        "threads": torch.get_num_threads(),
    } | machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The C++ table of the rows."""
    way = {
        (int(row["D"]), int(row["K"])): f"{{{row['few_rows']}, {'true' if int(row['int8']) else 'false'}}}"
        for row in rows
    }
    lines = []
    for d in WIDTHS:
        known = [way[d, k] for k in SIZES if (d, k) in way]
        cells = known + known[-1:] * (len(SIZES) - len(known))
        lines.append(f"    {{{', '.join(cells)}}},  // D = {d}")
    last = rows[-1]
    return "\n".join(
        [
            "// Written by `python -m benchmarks.search_ways`, from benchmarks/results/search_ways.csv.",
            f"// {last['cpu']}, {last['isa']}, threads: {last['threads']}, {last['day']}.",
            "",
            "#pragma once",
            "",
            '#include "search_way.h"',
            "",
            "namespace fastvq {",
            "",
            f"constexpr int kLowestWidth = {_exponent(WIDTHS[0])}, kWidthStep = 1, kWidths = {len(WIDTHS)};",
            f"constexpr int kLowestCodes = {_exponent(SIZES[0])}, kCodesStep = 2, kSizes = {len(SIZES)};",
            "",
            "// clang-format off",
            f"// K = {', '.join(map(str, SIZES))}",
            "constexpr SearchWay kSearchWays[kWidths][kSizes] = {",
            *lines,
            "};",
            "// clang-format on",
            "",
            "}  // namespace fastvq",
            "",
        ]
    )


def _exponent(power: int) -> int:
    return power.bit_length() - 1


def main() -> None:
    """Measure, write the rows and the table."""
    shapes = [(k, d) for d in WIDTHS for k in SIZES if k * d <= MOST_ELEMENTS]
    rows = [measured(k, d) for k, d in tqdm(shapes, unit="shape")]
    write_csv(RESULTS, rows)
    write_bytes(TABLE, table(read_csv(RESULTS)).encode())


if __name__ == "__main__":
    main()
