"""`python -m benchmarks.table`: write what benchmarks/results/cpu.csv says into README.md and docs/measurements.md."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from fastvq.cli.bench import UNCHANGED
from fastvq.measure.contenders import UNITS
from fastvq.measure.table import fill_table, read_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.csv"
NAMES = {
    "fastvq": "fastvq",
    "module": "`fastvq.VectorQuantize`",
    "naive": "naive",
    "chunked": "plain torch",
    "faiss": "faiss",
    "peer": "vector-quantize-pytorch",
}

Row = dict[str, str]
Key = tuple[str, str, str, str]  # N, K, D, case


def grouped(rows: list[Row], part: str) -> dict[Key, dict[tuple[str, str, str], Row]]:
    """A part's rows by shape and case, then by allocator, threads and contender."""
    groups: dict[Key, dict[tuple[str, str, str], Row]] = {}
    for row in rows:
        if row["part"] == part:
            key = row["N"], row["K"], row["D"], row["case"]
            groups.setdefault(key, {})[row["allocator"], row["threads"], row["contender"]] = row
    return groups


def label(key: Key) -> str:
    """A shape, and whether its codebook was searched more than once."""
    return ", ".join(key[:3]) + (", unchanged" if key[3].endswith(UNCHANGED) else "")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def times(value: float) -> str:
    """A ratio, as exact as it is worth."""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def milliseconds(row: Row) -> str:
    """A median."""
    value = float(row["p50_ms"])
    return f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


class Summary:
    """The tables of one file of results."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.threads = str(max(int(row["threads"]) for row in rows))
        self.memory = {
            (row["case"], row["N"], row["K"], row["D"], row["contender"]): float(row["peak_mib"])
            for row in rows
            if row["part"] == "memory"
        }

    def ratio(self, group: dict[tuple[str, str, str], Row], contender: str) -> str:
        """How many times as long as fastvq under the same allocator: default, and with memory kept in brackets."""
        found = [group.get((allocator, self.threads, contender)) for allocator in ("default", "kept")]
        if None in found:
            return "-"
        default, kept = (times(float(row["ratio"])) for row in found if row is not None)
        return f"{default} ({kept})"

    def peaks(self, operation: str, key: Key) -> str:
        """Peak memory of fastvq and of the naive version."""
        own, naive = (self.memory.get((operation, *key[:3], name)) for name in ("fastvq", "naive"))
        return "-" if own is None or naive is None else f"{own:.0f} / {naive:.0f} MiB"

    def rivals(self, part: str, names: list[str], more: list[str]) -> str:
        """fastvq's time and its rivals' ratios, a line a shape; `more` of: peaks, memory."""
        head = ["N, K, D", "fastvq"]
        if "peaks" in more:
            head += ["of float32 peak", "of int8 peak"]
        head += [NAMES[name] for name in names]
        if "memory" in more:
            head.append("memory: fastvq / naive")
        lines = []
        for key, group in grouped(self.rows, part).items():
            kept = group["kept", self.threads, "fastvq"]
            line = [label(key), milliseconds(group["default", self.threads, "fastvq"])]
            if "peaks" in more:
                line += [f"{float(kept[f'of_{unit}_peak']):.2f}" if kept[f"of_{unit}_peak"] else "-" for unit in UNITS]
            line += [self.ratio(group, name) for name in names]
            if "memory" in more:
                line.append(self.peaks(part, key))
            lines.append(line)
        return markdown(head, lines)

    def limits(self, names: list[str]) -> str:
        """How many times as fast as each rival fastvq's search is, and would be at the peak of int8 dot products."""
        lines = []
        for key, group in grouped(self.rows, "search").items():
            line = [label(key)]
            operations = 2 * math.prod(int(size) for size in key[:3])
            for name in names:
                cells = []
                for allocator in ("default", "kept"):
                    row, peak = (group.get((allocator, self.threads, found)) for found in (name, "int8 peak"))
                    if row and peak:
                        limit = float(row["p50_ms"]) * float(peak["gflops"]) * 1e6 / operations
                        cells.append(f"{times(float(row['ratio']))} of {times(limit)}")
                line.append(f"{cells[0]} ({cells[1]})" if len(cells) == 2 else "-")
            lines.append(line)
        return markdown(["N, K, D", *(NAMES[name] for name in names)], lines)

    def machine(self) -> str:
        """Where the figures come from."""
        first = self.rows[0]
        names = {"torch": "torch", "faiss": "faiss", "peer": "vector-quantize-pytorch", "fastvq": "fastvq"}
        versions = ", ".join(f"{name} {first[key]}" for key, name in names.items() if first[key])
        days = " and ".join(sorted({row["day"] for row in self.rows}))
        return f"{first['cpu']} ({first['isa']}), {self.threads} threads, {versions}; {days}."

    def operators(self) -> str:
        """What a training step is made of: times, and the rates of what moves memory beside that of a copy."""
        lines = []
        for key, group in grouped(self.rows, "operators").items():
            found = {name: row for (_, _, name), row in group.items()}
            line = [
                ", ".join(key[:3]),
                *(milliseconds(found[name]) for name in ("fastvq", "search", "vector_quantize")),
            ]
            for name in ("ema_step_", "backward"):
                line.append(f"{milliseconds(found[name])} ({float(found[name]['gbs']):.0f})")
            lines.append([*line, f"{float(found['copy']['gbs']):.0f} GB/s"])
        head = ["N, K, D", "step", "search", "`vector_quantize`", "`ema_step_`", "backward", "copy"]
        return markdown(head, lines)

    def data(self) -> str:
        """The rate on each kind of data as a share of the Gaussian, and against the float32 kernel."""
        groups = grouped(self.rows, "data")
        families = list(dict.fromkeys(key[3].partition(",")[0] for key in groups))
        lines: dict[str, list[str]] = {}
        gaussian: dict[str, float] = {}  # the first of each line
        for key, group in groups.items():
            own = float(group["default", self.threads, "fastvq"]["p50_ms"])
            dense = group.get(("default", self.threads, "float32 kernel"))
            cell = f"{gaussian.setdefault(label(key), own) / own:.2f}"
            cell += f" ({float(dense['ratio']):.2f})" if dense else ""
            lines.setdefault(label(key), [label(key)]).append(cell)
        return markdown(["N, K, D", *families], list(lines.values()))

    def scaling(self) -> str:
        """What all threads gain over one."""
        lines = []
        for key, group in grouped(self.rows, "threads").items():
            one, every = (
                {name: float(row["p50_ms"]) for (_, number, name), row in group.items() if number == threads}
                for threads in ("1", self.threads)
            )
            line = [f"{key[3]}, {', '.join(key[:3])}", f"{one['fastvq']:.2f} ms", f"{every['fastvq']:.2f} ms"]
            line.append(f"{one['fastvq'] / every['fastvq']:.2f}")
            # The loops do as much on every thread: each thread's share of the work, times the threads.
            line += [f"{int(self.threads) * one[f'{u} peak'] / every[f'{u} peak']:.2f}" for u in UNITS]
            lines.append(line)
        head = ["", "1 thread", f"{self.threads} threads", "gain", "gain of the float32 loop", "gain of the int8 loop"]
        return markdown(head, lines)

    def model(self) -> str:
        """A model with the layer, without, and the layer by itself."""
        names = {
            "none": "without a layer",
            "fastvq": "with `fastvq.VectorQuantize`",
            "layer": "`fastvq.VectorQuantize` by itself, forward and backward",
            "naive": "with the naive layer",
            "peer": "with vector-quantize-pytorch",
        }
        ((_, group),) = grouped(self.rows, "model").items()
        found = {name: group.get(("default", self.threads, name)) for name in names}
        return markdown(
            ["forward and backward", "time"], [[names[n], milliseconds(row)] for n, row in found.items() if row]
        )

    def peak_memory(self) -> str:
        """Peak memory of every shape."""
        lines = []
        for operation, n, k, d, contender in self.memory:
            if contender == "fastvq":
                cells = [self.memory.get((operation, n, k, d, name)) for name in ("fastvq", "naive")]
                lines.append([operation, f"{n}, {k}, {d}", *("-" if c is None else f"{c:.1f} MiB" for c in cells)])
        return markdown(["", "N, K, D", "fastvq", "naive"], lines)


def readme(summary: Summary) -> str:
    """What stands in the README."""
    search = summary.rivals("search", ["naive", "chunked", "faiss", "peer"], ["peaks", "memory"])
    step = summary.rivals("step", ["module", "naive", "chunked", "peer"], ["memory"])
    return "\n\n".join(
        [
            "**Search**, times as long as fastvq (with memory kept in brackets):",
            search,
            "**The training step of the layer: forward, backward, EMA update**, likewise:",
            step,
            summary.machine(),
        ]
    )


def sections(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """docs/measurements.md: a title, what is shown, and the table of each part that was measured."""
    measured = {row["part"] for row in summary.rows}
    if "search" in measured:
        yield (
            "What a search can reach",
            "How many times as long as fastvq's search each rival takes, of how many times it would be if fastvq did "
            "nothing but its N K D int8 products at the peak of the machine, measured in the same turns (with memory "
            "kept in brackets). What lies between is in [What limits the speed](certified-search.md).",
            summary.limits(["naive", "chunked", "faiss"]),
        )
    if "operators" in measured:
        yield (
            "What a training step is made of",
            "fastvq's operators one by one, each timed by itself with the caches as those before it in the step have "
            "left them. `vector_quantize` contains the search; what it takes beyond that is the output and the loss. "
            "In brackets GB/s of what must be read and written, each tensor once, beside those of a copy that no "
            "cache holds.",
            summary.operators(),
        )
    if "data" in measured:
        yield (
            "Kinds of data",
            "fastvq's rate as a share of its rate on Gaussian data; in brackets how many times as fast as its own "
            "float32 kernel on the same data. The power law gives dimension i the standard deviation 1 / i; a fresh "
            "codebook is drawn from U(-1/K, 1/K); the outlier dimension is fifty times as large as the others; "
            "collapsed codes all lie within a thousandth of one point. Every code changes before each search, which "
            "packs them in its time, unless it says unchanged.",
            summary.data(),
        )
    if "residual" in measured:
        yield (
            "Residual quantisation",
            "Eight stages of 1,024 codes on x (8, 750, 128) in evaluation, times as long as `residual_quantize` (with "
            "memory kept in brackets).",
            summary.rivals("residual", ["naive", "chunked", "peer"], []),
        )
    if "threads" in measured:
        yield (
            "Threads",
            "What all threads gain over one, beside what loops gain that do nothing but arithmetic in registers.",
            summary.scaling(),
        )
    if "model" in measured:
        yield (
            "In a model",
            "Forward and backward of a convolutional autoencoder on 16 images of 128 pixels, with 16,384 latents of 64 "
            "channels and 1,024 codes between its halves. Were two pools of threads fighting, the model with the layer "
            "would take longer than the model and the layer one after the other.",
            summary.model(),
        )
    if "memory" in measured:
        yield "Peak memory", "Of one call above its inputs, results included.", summary.peak_memory()


def measurements(summary: Summary) -> str:
    """The page docs/measurements.md."""
    wrap = functools.partial(textwrap.fill, width=120, break_on_hyphens=False)
    parts = [f"## {title}\n\n{wrap(text)}\n\n{table}\n" for title, text, table in sections(summary)]
    head = wrap(
        "Written by `python -m benchmarks.table` from benchmarks/results/cpu.csv, which `make bench` measures; the "
        "tables of search and of the training step are in the README. " + summary.machine()
    )
    return "\n".join([f"# Measurements\n\n{head}\n", *parts])


def main() -> None:
    """Replace what stands between the marks, and the page of the rest."""
    summary = Summary(read_csv(RESULTS))
    fill_table(ROOT / "README.md", "python -m benchmarks.table", readme(summary))
    (ROOT / "docs" / "measurements.md").write_text(measurements(summary), encoding="utf-8")


if __name__ == "__main__":
    main()
