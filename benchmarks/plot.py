"""`python -m benchmarks.plot`: draw docs/images/search.png from benchmarks/results/cpu.csv."""

from __future__ import annotations

from benchmarks.table import NAMES, RESULTS, ROOT, Row
from fastvq.cli.bench import UNCHANGED
from fastvq.cli.figures import INK, dress, figure, render
from fastvq.measure.contenders import UNITS
from fastvq.measure.table import read_csv

PICTURE = ROOT / "docs" / "images" / "search.png"
LOOKS = {  # colour, marker
    "fastvq": ("#c2410c", "o"),
    "faiss": ("#2563a8", "D"),
    "chunked": ("#4d7c4a", "s"),
    "naive": ("#7a6a9b", "^"),
    "peer": ("#8a93a3", "v"),
}


def label(row: Row) -> str:
    """A shape, with what is out of the ordinary."""
    shape = f"{int(row['N']):,} × {int(row['K']):,} × {row['D']}"
    return f"{shape}, {UNCHANGED}" if row["case"] == UNCHANGED else shape


def draw(rows: list[Row]) -> bytes:
    """Effective rates 2 N K D / t of every contender with memory kept, and the machine's peaks, as PNG."""
    shown = [row for row in rows if row["part"] == "search" and row["allocator"] == "kept"]
    labels = list(dict.fromkeys(label(row) for row in shown))[::-1]
    canvas = figure(9.0, 0.9 + 0.42 * len(labels))
    axes = canvas.subplots()
    for name, (colour, marker) in LOOKS.items():
        points = [(float(row["gflops"]), labels.index(label(row))) for row in shown if row["contender"] == name]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=46, color=colour, marker=marker, label=NAMES[name], zorder=3, linewidths=0)
    for unit in UNITS:
        peaks = sorted(float(row["gflops"]) for row in shown if row["contender"] == f"{unit} peak")
        if peaks:
            peak = peaks[len(peaks) // 2]
            axes.axvline(peak, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            above = axes.get_xaxis_transform()
            axes.text(peak, 1.01, f"{unit} peak", transform=above, ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    dress(axes, "Nearest-code search of N rows × K codes × D dimensions\n", "2NKD / time, in G operations/s")
    axes.grid(axis="both", color="#e6e9ef", linewidth=0.8)
    axes.tick_params(axis="y", labelcolor=INK)
    canvas.legend(frameon=False, labelcolor=INK, fontsize=8.5, ncols=len(LOOKS), loc="outside lower center")
    return render(canvas)


def main() -> None:
    """Write the picture."""
    PICTURE.write_bytes(draw(read_csv(RESULTS)))


if __name__ == "__main__":
    main()
