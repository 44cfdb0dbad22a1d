"""`python -m benchmarks.cuda_report`: the machine code of the CUDA search, one line a policy and architecture.

Reads the extension as it was built, writes benchmarks/results/cuda_kernels.csv and the tables of docs/kernels.md; with
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
from typing import Any, NamedTuple

from benchmarks.sass import MACHINES, TENSOR, Listing, parse_cuda, pipe, spills_of, tool

ROOT = Path(__file__).parents[1]
CSV, PAGE = ROOT / "benchmarks" / "results" / "cuda_kernels.csv", ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- table: python -m benchmarks.cuda_report -->", "<!-- end of table -->"
ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
COUNTED = ("sm_80", "sm_90")  # whose loops are counted; of the others registers and memory
KEY = ("arch", "operand", "element", "source", "width")
COUNTS = ("alu", "issued", "tensor", "bound", "loop")
OPERANDS, SOURCES = ("stored", "rounded", "split"), ("resident", "streamed", "chunked", "none", "staged")
TYPES = {"stored bfloat16": 1, "stored float16": 2}  # fastvq::Float; the others are float32, 0

# The least that is asked of a policy: {(arch, width): {column: bound}}.
TARGETS = {
    ("sm_90", "64"): {"alu": 1.5, "tensor": 0.75},
    ("sm_90", "128"): {"tensor": 0.9},
    ("sm_80", "64"): {"tensor": 0.9},
}
ISSUED = 2.0  # instructions an element, at most, of float32 with D = 8 and K = 1024: split, resident, width 32

Row = dict[str, Any]


class Usage(NamedTuple):
    """What ptxas gave a kernel: registers a thread, bytes of stack and of local memory."""

    registers: int
    stack: int
    local: int


def usage(library: Path) -> dict[tuple[str, str], Usage]:
    """The usage of every kernel in a library or cubin, by architecture (sm_90) and mangled name: as -Xptxas -v says."""
    done = subprocess.run([tool("cuobjdump"), "-res-usage", str(library)], capture_output=True, text=True, check=True)
    arch, name, found = "", "", {}
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[arch, name] = Usage(*map(int, match.groups()))
    return found


def kernels(library: Path) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, disassembly) of every screen whose loop is counted, in a library or cubin."""
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
            if arch is None or arch[0] not in COUNTED:
                continue
            usage = subprocess.run(
                [tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
            ).stdout
            for part in re.split(r"(?m)^\s*\.section\s+\.text\.", usage)[1:]:
                name = part.split(",")[0].split()[0]
                if "ScreenPolicy" in name:
                    yield arch[0], name, part


def policy_of(name: str) -> tuple[str, str, str, int]:
    """(operand, element, source, width) of a mangled kernel."""
    found = re.search(r"OperandE(\d)E\w*?(half|bfloat16).*?Li(\d+)ELNS_6SourceE(\d)E", name)
    if found is None:
        raise ValueError(f"not a screen's name: {name}")
    element = "float16" if found[2] == "half" else "bfloat16"
    return OPERANDS[int(found[1])], element, SOURCES[int(found[4])], int(found[3])


def plan_of(operand: str, element: str, source: str, width: int) -> dict[str, Any]:
    """What the extension plans where it takes a policy: 10 million rows, 1024 codes or, where they pass by, 2^20."""
    kernels = importlib.import_module("fastvq._cuda")
    x = TYPES.get(f"{operand} {element}", 0)
    if source == "staged":
        plan = kernels.plan_stages((90, 132, 232_448), x, x, 1, 8, 10**7, 1024, width)
    else:
        d = 512 if source == "chunked" else min(16, (width - 3) // 3) if operand == "split" else width
        k = 1024 if source == "resident" else 1 << 20
        plan = kernels.plan_search((90, 132, 232_448), x, x, 1, 10**7, k, d)
    assert (plan["operand"], plan["source"]) == (operand, source), plan
    return dict(plan)


def order(row: Row) -> list[str]:
    """By architecture, operand, source and width, numbers as numbers."""
    return [str(row[name]).rjust(8) for name in KEY]


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
    row |= {"tensor": cycles["tensor"] / cycles[bound], "bound": bound}
    return row | {"loop": " ".join(f"{name}:{n:g}" for name, n in mix.most_common(10))}


def measure(library: Path, targets_only: bool = False) -> list[Row]:
    """A line for every policy and architecture in a library, or for one of each kind that has a target."""
    texts, rows = {(arch, name): text for arch, name, text in kernels(library)}, []
    for (arch, name), used in usage(library).items():
        if "ScreenPolicy" not in name or arch not in ARCHES:
            continue
        operand, element, source, width = policy_of(name)
        wanted = operand == "rounded" and (arch, str(width)) in TARGETS and source in ("resident", "streamed")
        if targets_only and not (wanted or (arch in COUNTED and (operand, source, width) == ("split", "resident", 32))):
            continue
        plan = plan_of(operand, element, source, width)
        elements = plan["rows"] // plan["warps"] * plan["tile"]  # of a warp and a tile
        row = dict(zip(KEY, (arch, operand, element, source, width), strict=True)) | dict.fromkeys(COUNTS, "")
        if source == "chunked":
            row["width"], width = "over 256", 512
        listing = parse_cuda(texts[arch, name]) if arch in COUNTED else None
        if listing is not None:
            row |= {
                k: f"{v:.2f}" if isinstance(v, float) else v for k, v in count(arch, listing, elements, width).items()
            }
        row |= {"registers": used.registers, "shared": plan["shared_memory"]}
        rows.append(row | {"spills": used.stack + used.local + (spills_of(listing) if listing is not None else 0)})
    return sorted(rows, key=order)


def missed(row: Row) -> list[str]:
    """Which targets a line misses."""
    searches = row["operand"] != "split" and row["source"] != "staged"
    targets = TARGETS.get((row["arch"], str(row["width"])), {}) if searches else {}
    found = []
    if "alu" in targets and float(row["alu"]) > targets["alu"]:
        found.append(f"{row['alu']} ALU operations an element, {targets['alu']} are allowed")
    if "tensor" in targets and float(row["tensor"]) < targets["tensor"]:
        found.append(f"tensor-bound for {row['tensor']} of the time, {targets['tensor']} is asked for")
    small = (row["operand"], row["source"], str(row["width"])) == ("split", "resident", "32")
    if small and row["issued"] and float(row["issued"]) > ISSUED:
        found.append(f"{row['issued']} instructions an element, {ISSUED} are allowed")
    if int(row["spills"]):
        found.append(f"{row['spills']} bytes of stack or local memory, or instructions that touch it")
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
        elif row["alu"]:
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
    """The page's tables in Markdown."""
    lines = [
        "| device | operand | codes | width | ALU | issued | tensor-bound | busiest | registers | KiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['arch']} | {operand_of(r)} | {r['source']} | {r['width']} | {r['alu']} | {r['issued']} | {r['tensor']} "
        f"| {r['bound']} | {r['registers']} | {int(r['shared']) / 1024:.0f} |"
        for r in rows
        if r["alu"]
    ]
    lines += ["", f"| registers | codes | width | {' | '.join(ARCHES)} |", "|---" * (3 + len(ARCHES)) + "|"]
    registers = {tuple(r[name] for name in KEY): r["registers"] for r in rows}
    for r in rows:
        if r["arch"] == ARCHES[0]:
            by_arch = [registers[(arch, *(r[name] for name in KEY[1:]))] for arch in ARCHES]
            lines.append(f"| {operand_of(r)} | {r['source']} | {r['width']} | {' | '.join(map(str, by_arch))} |")
    return "\n".join(lines)


def operand_of(row: Row) -> str:
    """How a row's operand is called on the page."""
    return row["element"] if row["operand"] == "stored" else row["operand"]


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
    rows.sort(key=order)
    if not options.check:
        write(rows)
    complaints = check(rows, read())
    print(*complaints, sep="\n")
    print(f"{len(rows)} lines, {len(complaints)} complaints")
    return min(len(complaints), 1)


if __name__ == "__main__":
    sys.exit(main())
