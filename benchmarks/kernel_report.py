"""`python -m benchmarks.kernel_report`: what the machine code of the kernels promises, beside flash-kmeans'.

Writes benchmarks/results/kernels.csv and the tables of docs/kernels.md; with --check writes nothing and fails where a
kernel has become worse than the committed file. Static counts, not times: `benchmarks.sass` says what they mean.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from fastvq.kernels import launch

from benchmarks.ahead_of_time import Launch, batches, compiled, launches_of, operator_calls, specialise
from benchmarks.sass import Listing, analyse, listings_of

ROOT = Path(__file__).parents[1]
CSV, PAGE = ROOT / "benchmarks" / "results" / "kernels.csv", ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- tables: python -m benchmarks.kernel_report -->", "<!-- end of tables -->"
DIMS = (8, 32, 64, 128, 256)
ROWS, CODES = 10_000_000, 65_536  # the shape that flash-kmeans publishes its rate for
LEVEL = ("PART", "SIZE")  # constants that tell the levels of a sum apart
KEY = ("source", "kernel", "arch", "D")

Row = dict[str, Any]


def elements_of(what: Launch) -> tuple[int, int]:
    """Padded dimensions, and the (row, code) pairs of one iteration of the loop over codes; 0 without a product."""
    constants = what.named_constants
    if what.kernel.__name__ in ("screen_kernel", "stages_kernel"):
        return constants["WIDTH"], constants["ROWS"] * constants["COLUMNS"] * constants["STEPS"]
    if "D_PAD" in constants:  # flash-kmeans
        return constants["D_PAD"], constants["BLOCK_N"] * constants["BLOCK_K"]
    return 0, 0


def flash_kmeans(arch: str, d: int) -> Launch:
    """The launch that flash-kmeans' own table for the H200 (on sm_80 the A100) gives, cut to the device's memory."""
    from flash_kmeans import assign_euclid_triton as rival

    table = {"sm_80": rival._heuristic_euclid_config_a100_smallD}.get(arch, rival._heuristic_euclid_config_h200_smallD)
    config = table(ROWS, CODES, d, torch.bfloat16)
    config = rival._fit_config_to_smem(config, rival._pad_d(d), 2, launch.DEVICES[arch].shared_memory)
    x, codebook = (torch.empty(1, n, d, dtype=torch.bfloat16, device="meta") for n in (ROWS, CODES))
    squares = [torch.empty(1, n, device="meta") for n in (ROWS, CODES)]
    tensors = [x, codebook, *squares, torch.empty(1, ROWS, dtype=torch.int32, device="meta")]
    strides = [stride for t in tensors for stride in t.stride()]
    constants = {"D_PAD": rival._pad_d(d), **config}
    return specialise(arch, rival._euclid_assign_kernel, *tensors, 1, ROWS, CODES, d, *strides, **constants)


def launches(arches: Iterable[str], with_rival: bool) -> list[tuple[str, int, Launch]]:
    """(source, D, launch) of every line of the table; of sums that differ in their level alone, the first."""
    found: dict[tuple[Any, ...], tuple[str, int, Launch]] = {}
    for arch in arches:
        for d in DIMS:
            x, codebook = (torch.empty(n, d, dtype=torch.bfloat16, device="meta") for n in (ROWS, CODES))
            for call in operator_calls(x, codebook, "euclidean", option=False):
                for what in launches_of(arch, call):
                    levels = [(what.kernel.arg_names.index(name),) for name in what.named_constants if name in LEVEL]
                    rest = tuple(pair for pair in what.constants if pair[0] not in levels)
                    found.setdefault(("fastvq", d, what._replace(constants=rest)), ("fastvq", d, what))
            if with_rival:
                found["flash-kmeans", d, arch] = ("flash-kmeans", d, flash_kmeans(arch, d))
    return list(found.values())


def row_of(what: Launch, kernel: Any, listing: Listing) -> Row:
    """What one line of the table says of a launch."""
    dim, elements = elements_of(what)
    report = analyse(kernel, listing, what.arch, dim, elements or None)
    row: Row = {"registers": report.registers, "spills": report.spills, "shared": report.shared}
    row |= {"blocks": report.blocks, "warps": report.warps}
    row |= {"elements": elements or "", "alu": "", "shuffles": "", "tensor": "", "bound": ""}
    if elements:
        row |= {"alu": f"{report.alu:.2f}", "shuffles": f"{report.shuffles:g}"}
        row |= {"tensor": f"{report.tensor_fraction:.2f}", "bound": report.bound}
    return row | {"loop": " ".join(f"{name}:{count:g}" for name, count in list(report.mix.items())[:12])}


_work: list[list[Launch]] = []  # shared by fork


def _rows_at(place: int) -> list[Row]:
    torch.set_num_threads(1)
    kernels = [compiled(what) for what in _work[place]]
    return list(map(row_of, _work[place], kernels, listings_of(kernels, _work[place][0].arch)))


def measure(arches: Iterable[str], with_rival: bool) -> list[Row]:
    """All lines; what is the same at several D is compiled once, on all cores."""
    lines = launches(arches, with_rival)
    _work[:] = batches(dict.fromkeys(what for _, _, what in lines))
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        rows = itertools.chain(*pool.map(_rows_at, range(len(_work)), chunksize=1))
        found = dict(zip(itertools.chain(*_work), rows, strict=True))
    return [
        {"source": source, "kernel": what.kernel.__name__, "arch": what.arch, "D": d} | found[what]
        for source, d, what in lines
    ]


def worse(now: Row, before: dict[str, str]) -> list[str]:
    """In what a line is worse than the committed one."""
    found = []
    for name, slack in (("spills", 0.0), ("shuffles", 0.0), ("alu", 0.02)):
        if before[name] and float(now[name]) > float(before[name]) * (1 + slack):
            found.append(f"{name} {now[name]}, was {before[name]}")
    for name, slack in (("blocks", 0.0), ("tensor", 0.01)):
        if before[name] and float(now[name]) < float(before[name]) - slack:
            found.append(f"{name} {now[name]}, was {before[name]}")
    return found


def check(rows: list[Row], committed: list[dict[str, str]]) -> list[str]:
    """What is wrong with the rows, beside what is committed."""
    before: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in committed:
        before.setdefault(tuple(line[name] for name in KEY), []).append(line)  # an operator may launch a kernel twice
    complaints = []
    for row in rows:
        key = tuple(str(row[name]) for name in KEY)
        lines = before.get(key, [])
        if not lines:
            complaints.append(f"{' '.join(key)}: not in the table; run python -m benchmarks.kernel_report")
        else:
            line = lines.pop(0) if len(lines) > 1 else lines[0]
            complaints += [f"{' '.join(key)}: {what}" for what in worse(row, line)]
    return complaints


def tables(rows: list[dict[str, str]]) -> str:
    """The page's tables in Markdown."""
    by_key = {(row["source"], row["kernel"], row["arch"], row["D"]): row for row in rows}
    lines = [
        "| device | D | ALU operations an element | SHFL | tensor-bound | registers | shared memory | warps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arch in launch.DEVICES:
        for d in map(str, DIMS):
            own = by_key["fastvq", "screen_kernel", arch, d]
            rival = by_key["flash-kmeans", "_euclid_assign_kernel", arch, d]
            cells = [f"{own[name]} / {rival[name]}" for name in ("alu", "shuffles", "tensor", "registers")]
            cells += [f"{int(own['shared']) // 1024} / {int(rival['shared']) // 1024} KiB"]
            lines.append(f"| {arch} | {d} | {' | '.join([*cells, own['warps'] + ' / ' + rival['warps']])} |")
    kernels = dict.fromkeys(row["kernel"] for row in rows if row["source"] == "fastvq")
    lines += ["", "| kernel | " + " | ".join(launch.DEVICES) + " |", "|---" * (1 + len(launch.DEVICES)) + "|"]
    for kernel in kernels:
        cells = []
        for arch in launch.DEVICES:
            row = by_key.get(("fastvq", kernel, arch, "64")) or by_key.get(("fastvq", kernel, arch, "128"))
            cells.append(f"{row['registers']}, {int(row['shared']) / 1024:.0f}, {row['warps']}" if row else "-")
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    """The CSV and the page."""
    with CSV.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    page = f"{before}{BEGIN}\n{tables(read())}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(page, encoding="utf-8")


def read() -> list[dict[str, str]]:
    """The committed lines."""
    with CSV.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--arch", choices=list(launch.DEVICES), action="append", help="with --check; default: all")
    parser.add_argument("--print", action="store_true", help="print the lines and write nothing")
    options = parser.parse_args()
    rows = measure(options.arch or launch.DEVICES, with_rival=not options.check)
    if options.print:
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()))
        return 0
    if options.check:
        complaints = check(rows, read())
        print(*complaints, sep="\n")
        print(f"{len(rows)} lines, {len(complaints)} worse than the table or not in it")
        return min(len(complaints), 1)
    write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
