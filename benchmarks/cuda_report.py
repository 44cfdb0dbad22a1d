"""`python -m benchmarks.cuda_report`: the machine code of the CUDA search, one line a policy.

Reads the extension as it was built, writes benchmarks/results/cuda_kernels.csv and the table of docs/kernels.md; with
--check writes nothing and fails where a kernel has become worse than the committed file, or misses a target.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.sass import MACHINES, TENSOR, Listing, parse_cuda, pipe, spills_of, tool

ROOT = Path(__file__).parents[1]
CSV, PAGE = ROOT / "benchmarks" / "results" / "cuda_kernels.csv", ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- table: python -m benchmarks.cuda_report -->", "<!-- end of table -->"
ARCHES = ("sm_80", "sm_90")
KEY = ("arch", "operand", "source", "width")
OPERANDS, SOURCES = ("stored", "rounded", "split"), ("resident", "streamed", "chunked", "none", "staged")
FLOAT32, BFLOAT16 = 0, 1  # fastvq::Float

# The least that is asked of a policy: {(arch, operand, width): ((column, at most), ...)}.
TARGETS = {
    ("sm_90", "64"): {"alu": 1.5, "tensor": 0.75},
    ("sm_90", "128"): {"tensor": 0.9},
    ("sm_80", "64"): {"tensor": 0.9},
}
ISSUED = 2.0  # instructions an element, at most, of float32 with D = 8 and K = 1024: split, resident, width 32

Row = dict[str, Any]


def kernels(library: Path) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, disassembly) of every kernel of the search in a library or cubin."""
    with tempfile.TemporaryDirectory() as folder:
        if library.suffix == ".cubin":
            cubins = [library]
        else:
            subprocess.run(
                [tool("cuobjdump"), "-xelf", "all", str(library)], cwd=folder, check=True, capture_output=True
            )
            cubins = sorted(Path(folder).glob("*.cubin"))
        for cubin in cubins:
            arch = re.search(r"sm_\d+", cubin.name)
            if arch is None or arch[0] not in ARCHES:
                continue
            usage = subprocess.run(
                [tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
            ).stdout
            for part in re.split(r"(?m)^\s*\.section\s+\.text\.", usage)[1:]:
                name = part.split(",")[0].split()[0]
                if "ScreenPolicy" in name:
                    yield arch[0], name, part


def policy_of(name: str) -> tuple[str, str, str, int]:
    """(operand, source, element, width) of a mangled kernel."""
    found = re.search(r"OperandE(\d)E\w*?(half|bfloat16).*?Li(\d+)ELNS_6SourceE(\d)E", name)
    if found is None:
        raise ValueError(f"not a screen's name: {name}")
    return OPERANDS[int(found[1])], SOURCES[int(found[4])], found[2], int(found[3])


def tile_elements(operand: str, source: str, width: int) -> int:
    """(row, code) pairs of a warp and a tile, as the extension plans it."""
    plan_search = importlib.import_module("fastvq._cuda").plan_search
    x, d = (BFLOAT16 if operand == "stored" else FLOAT32), min(16, (width - 3) // 3) if operand == "split" else width
    device = (90, 1 if source == "resident" else 132, 232_448)
    if source == "chunked":
        d = 512
    k = 256 if source == "resident" else 1 << 20
    plan = plan_search(device, x, x, 1, 10**7, k, d)
    assert (plan["operand"], plan["source"]) == (operand, source), plan
    return int(plan["rows"]) // int(plan["warps"]) * int(plan["tile"])


def count(arch: str, listing: Listing, elements: int, width: int) -> Row:
    """What one tile costs a warp: the loop with the products, as often as it runs, and what is round it."""
    instructions = listing.instructions
    tensor = [i for i, instruction in enumerate(instructions) if TENSOR.match(instruction.name)]
    loops = [loop for loop in listing.loops if any(i in loop for i in tensor)]
    inner = loops[0]
    products = elements * width / (16 * 8 * 16)
    runs = products / sum(i in inner for i in tensor)
    weight = dict.fromkeys(inner, runs)
    if runs > 1:
        weight = {i: runs if i in inner else 1.0 for i in loops[1]}
    cycles: Counter[str] = Counter({"tensor": products * MACHINES[arch].hmma})
    mix: Counter[str] = Counter()
    for i, times in weight.items():
        mix[instructions[i].base] += times
        if i not in tensor:
            unit, taken = pipe(instructions[i], arch)
            cycles[unit] += times * taken
    lanes = elements / 32
    bound = max(cycles, key=lambda unit: cycles[unit])
    row: Row = {"alu": cycles["alu"] / MACHINES[arch].alu / lanes, "issued": sum(weight.values()) / lanes}
    row |= {"tensor": cycles["tensor"] / cycles[bound], "bound": bound, "spills": spills_of(listing)}
    return row | {"loop": " ".join(f"{name}:{n:g}" for name, n in mix.most_common(10))}


def measure(library: Path, targets_only: bool = False) -> list[Row]:
    """A line for every policy and architecture in a library; of twins one: not float16, not the staged loop."""
    rows = []
    for arch, name, text in kernels(library):
        operand, source, element, width = policy_of(name)
        if source == "staged" or (operand == "stored" and element == "half"):
            continue
        wanted = operand == "rounded" and (arch, str(width)) in TARGETS and source != "chunked"
        if targets_only and not wanted and (operand, source, width) != ("split", "resident", 32):
            continue
        padded = 512 if source == "chunked" else width
        row = {
            "arch": arch,
            "operand": operand,
            "source": source,
            "width": "over 256" if source == "chunked" else width,
        }
        counted = count(arch, parse_cuda(text), tile_elements(operand, source, width), padded)
        rows.append(row | {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in counted.items()})
    return sorted(rows, key=lambda row: [str(row[name]).rjust(8) for name in KEY])


def missed(row: Row) -> list[str]:
    """Which targets a line misses."""
    targets = TARGETS.get((row["arch"], row["width"]), {}) if row["operand"] != "split" else {}
    found = []
    if "alu" in targets and float(row["alu"]) > targets["alu"]:
        found.append(f"{row['alu']} ALU operations an element, {targets['alu']} are allowed")
    if "tensor" in targets and float(row["tensor"]) < targets["tensor"]:
        found.append(f"tensor-bound for {row['tensor']} of the time, {targets['tensor']} is asked for")
    if (row["operand"], row["source"], row["width"]) == ("split", "resident", "32") and float(row["issued"]) > ISSUED:
        found.append(f"{row['issued']} instructions an element, {ISSUED} are allowed")
    if int(row["spills"]):
        found.append(f"{row['spills']} instructions touch local memory")
    return found


def check(rows: list[Row], committed: list[dict[str, str]]) -> list[str]:
    """What is wrong with the rows, by their targets and beside what is committed."""
    before = {tuple(line[name] for name in KEY): line for line in committed}
    complaints = []
    for row in rows:
        key = tuple(str(row[name]) for name in KEY)
        found = missed(row)
        line = before.get(key)
        if line is None:
            found.append("not in the table; run python -m benchmarks.cuda_report")
        else:
            found += [
                f"{name} {row[name]}, was {line[name]}"
                for name in ("alu", "issued")
                if float(row[name]) > 1.02 * float(line[name])
            ]
            if float(row["tensor"]) < float(line["tensor"]) - 0.01:
                found.append(f"tensor {row['tensor']}, was {line['tensor']}")
        complaints += [f"{' '.join(key)}: {what}" for what in found]
    return complaints


def read() -> list[dict[str, str]]:
    """The committed lines."""
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[Row]) -> str:
    """The page's table in Markdown."""
    lines = [
        "| device | operand | codes | width | ALU operations | instructions | tensor-bound | busiest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['arch']} | {r['operand']} | {r['source']} | {r['width']} | {r['alu']} | {r['issued']} | {r['tensor']} "
        f"| {r['bound']} |"
        for r in rows
    ]
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    """The file and the page."""
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    page = PAGE.read_text()
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:start]}\n{table(rows)}\n{page[end:]}")


def main() -> int:
    """Write the table or, with --check, compare; returns how many complaints there are, 1 at most."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_report", description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", type=Path, help="default: fastvq's own extension; cubins too")
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    options = parser.parse_args()
    libraries = options.libraries or [Path(str(importlib.import_module("fastvq._cuda").__file__))]
    rows = [row for library in libraries for row in measure(library)]
    rows.sort(key=lambda row: [str(row[name]).rjust(8) for name in KEY])
    if not options.check:
        write(rows)
    complaints = check(rows, read())
    print(*complaints, sep="\n")
    print(f"{len(rows)} lines, {len(complaints)} complaints")
    return min(len(complaints), 1)


if __name__ == "__main__":
    sys.exit(main())
