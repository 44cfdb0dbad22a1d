"""The training step of the other modules beside vector-quantize-pytorch's: forward, and backward to every parameter.

`pytest` times each contender by itself. `python -m benchmarks.bench_modules [TITLE...]` has them take turns, and writes
times and peak memory to benchmarks/results/modules.csv and the README; what else was measured stays there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastvq.measure.memory import peak_mib
from fastvq.measure.table import Row, fill_table, machine, machine_line, read_csv, write_csv
from fastvq.measure.timing import Work, interleave, medians
from fastvq.measure.worker import RETURN_MEMORY, Worker

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "benchmarks" / "results" / "modules.csv", ROOT / "README.md"
PACKAGES = {"fastvq": "fastvq", "peer": "vector_quantize_pytorch"}

# title: class, constructor, shape of the input
MODULES = {
    "LFQ, 2^10 codes": ("LFQ", {"dim": 10}, (4, 1024, 10)),
    "LFQ, 2^14 codes": ("LFQ", {"dim": 14}, (4, 1024, 14)),
    "LFQ, 2^18 codes": ("LFQ", {"dim": 18}, (4, 1024, 18)),
    "SimVQ, K = 8192, D = 256": ("SimVQ", {"dim": 256, "codebook_size": 8192}, (4, 1024, 256)),
    "FSQ, 8 x 5 x 5 x 5 levels": ("FSQ", {"levels": [8, 5, 5, 5]}, (4, 4096, 4)),
    "ResidualLFQ, 8 stages of 2^10": (
        "ResidualLFQ",
        {"dim": 10, "codebook_size": 1024, "num_quantizers": 8},
        (4, 1024, 10),
    ),
    "ResidualVQ, 8 stages of 2^10, D = 128": (
        "ResidualVQ",
        {"dim": 128, "codebook_size": 1024, "num_quantizers": 8},
        (8, 750, 128),
    ),
}
TOO_LARGE = {("LFQ, 2^18 codes", "peer")}  # its temporaries of 4096 x 2^18 numbers are 4 GiB each, ten of them


def step_work(title: str, contender: str) -> Work:
    """One training step."""
    name, options, shape = MODULES[title]
    torch.manual_seed(0)
    layer = getattr(importlib.import_module(PACKAGES[contender]), name)(**options)
    x = torch.randn(shape, requires_grad=True)

    def call() -> None:
        layer.zero_grad()
        x.grad = None
        quantized, _, *losses = layer(x)
        (quantized.sum() + sum(loss.sum() for loss in losses)).backward()

    return Work(call)


def peak_of_step(title: str, contender: str) -> float:
    """Its peak memory, in MiB, beyond the module and its input."""
    return peak_mib(step_work(title, contender).call)


@pytest.mark.parametrize("contender", PACKAGES)
@pytest.mark.parametrize("title", MODULES)
def test_module(benchmark, title, contender):
    if (title, contender) in TOO_LARGE:
        pytest.skip("too large")
    benchmark.group = title
    benchmark.extra_info |= machine()
    benchmark.pedantic(step_work(title, contender).call, rounds=5, warmup_rounds=1)


def measure(title: str) -> list[Row]:
    """The rows of one module: the median time and the peak memory of each contender."""
    contenders = [name for name in PACKAGES if (title, name) not in TOO_LARGE]
    peaks = {}
    for name in contenders:
        with Worker(RETURN_MEMORY) as child:
            child.call(peak_of_step, "FSQ, 8 x 5 x 5 x 5 levels", name)  # libraries and threads
            peaks[name] = child.call(peak_of_step, title, name)
    with Worker() as child:
        turns = {name: child.turn(step_work, title, name) for name in contenders}
        times = medians(interleave(turns, seconds=5))
    rows = []
    for name in contenders:
        row = {"module": title, "shape": "x".join(map(str, MODULES[title][2])), "contender": name}
        row |= {"threads": torch.get_num_threads(), "median_ms": round(times[name], 3)}
        rows.append(row | {"peak_mib": round(peaks[name], 1)} | machine())
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as the README shows them: for each module what the peer takes beside ours."""
    lines = ["| module | fastvq | vector-quantize-pytorch | peak memory: fastvq / the peer |", "|---|---|---|---|"]
    for title in MODULES:
        found = {row["contender"]: row for row in rows if row["module"] == title}
        if not found:
            continue
        mine, theirs = found["fastvq"], found.get("peer")
        time, peak, their_peak = float(mine["median_ms"]), float(mine["peak_mib"]), "-"
        verdict = "too large to run"
        if theirs is not None:
            verdict = f"{float(theirs['median_ms']) / time:.1f} times as long"
            their_peak = f"{float(theirs['peak_mib']):.0f}"
        lines.append(f"| {title} | {time:.1f} ms | {verdict} | {peak:.0f} / {their_peak} MiB |")
    return "\n".join([*lines, "", machine_line(rows)])


def main(titles: list[str]) -> None:
    """Measure the modules of the given titles, or all."""
    for title in titles or MODULES:
        new = measure(title)
        others = [row for row in read_csv(RESULTS) if row["module"] != title] if RESULTS.exists() else []
        write_csv(RESULTS, others + new)
        print(table(new), flush=True)
    fill_table(README, "python -m benchmarks.bench_modules", table(read_csv(RESULTS)))


if __name__ == "__main__":
    from benchmarks import bench_modules  # the name that the measuring processes find it by

    bench_modules.main(sys.argv[1:])
