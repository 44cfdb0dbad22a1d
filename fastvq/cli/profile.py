"""`fastvq profile`: search as the codebook grows: time, rate against the device's limits, memory, second looks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastvq
from fastvq.backends import select
from fastvq.cli.parser import OneLineParser, add_device, device_of, positive_int
from fastvq.data.errors import UserError
from fastvq.measure.contenders import naive_search
from fastvq.measure.device import Limits, MemoryMeter, limits, milliseconds
from fastvq.measure.table import machine, write_csv
from fastvq.measure.timing import percentile

SIZES = [1 << power for power in range(10, 21)]
QUICK_SIZES = SIZES[::5]
DIMS, QUICK_DIMS = [8, 64, 256], [64]
ROWS, QUICK_ROWS = 4096, 256
SECONDS = 0.5  # of calls at a point, three at least
MOST_NAIVE_BYTES = 1 << 29  # of an N x K matrix that is still made to see the naive version's memory
FILES = {"csv": "profile.csv", "picture": "profile.png", "trace": "trace.json"}


@dataclass(frozen=True)
class Point:
    """What was measured at one size of codebook.

    Attributes:
        rows: N.
        codebook_size: K.
        dim: D.
        calls: how many were timed, each after a change of the codebook, so that nothing kept from the last is of use.
        p20_ms: the 20th percentile of their times.
        p50_ms: the median.
        p80_ms: the 80th percentile.
        gops: effective rate 2 N K D / p50, in G operations/s.
        intensity: operations for each byte that must be moved: rows, codes and indices, once each.
        peak_mib: memory that a call takes at most beside its inputs; None where the system does not tell.
        naive_mib: the same of the naive version.
        naive_measured: whether it was measured, or is two N x K matrices of float32, which is what it makes.
        second_look: share of the rows for which the screen left more than one code; None where the backend does not
            count.
        exact: share of the rows whose code was decided in float64.
    """

    rows: int
    codebook_size: int
    dim: int
    calls: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gops: float
    intensity: float
    peak_mib: float | None
    naive_mib: float
    naive_measured: bool
    second_look: float | None
    exact: float | None


def _draw(n: int, k: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(rows, d, device=device, generator=generator) for rows in (n, k))  # type: ignore[return-value]


def _search_call(n: int, k: int, d: int, device: str) -> Callable[[], object]:
    x, codebook = _draw(n, k, d, device)
    return lambda: fastvq.search(x, codebook)


def _naive_call(n: int, k: int, d: int, device: str) -> Callable[[], object]:
    x, codebook = _draw(n, k, d, device)
    return lambda: naive_search(x, codebook)


def _shares(x: Tensor, codebook: Tensor) -> tuple[float | None, float | None]:
    """The shares of rows that needed a second look, and float64, as the backend counts them; None if it does not."""
    count = getattr(select.backend_for(None, x.device), "search_counts", None)
    if count is None:
        return None, None
    counts = count(x, codebook)
    return counts.second_look / counts.rows, counts.exact / counts.rows


def measure(n: int, k: int, d: int, device: torch.device, meter: MemoryMeter) -> Point:
    """Time, memory and second looks of searching K codes for N rows."""
    x, codebook = _draw(n, k, d, str(device))
    second_look, exact = _shares(x, codebook)  # a search too: it warms up
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS * 1e3:
        codebook[0, 0].neg_()
        times.append(milliseconds(lambda: fastvq.search(x, codebook), device))
    times.sort()
    median = percentile(times, 50)
    shape = n, k, d, str(device)
    naive = meter.peak_mib(_naive_call, *shape) if n * k * 4 <= MOST_NAIVE_BYTES else None
    return Point(
        rows=n,
        codebook_size=k,
        dim=d,
        calls=len(times),
        p20_ms=round(percentile(times, 20), 4),
        p50_ms=round(median, 4),
        p80_ms=round(percentile(times, 80), 4),
        gops=round(2 * n * k * d / median / 1e6, 1),
        intensity=round(2 * n * k * d / (4 * (n + k) * d + 8 * n), 2),
        peak_mib=meter.peak_mib(_search_call, *shape),
        naive_mib=2 * n * k * 4 / 2**20 if naive is None else naive,
        naive_measured=naive is not None,
        second_look=second_look,
        exact=exact,
    )


def trace(points: Sequence[Point], device: torch.device, path: Path) -> None:
    """A search of each size, as a Chrome trace (chrome://tracing, or ui.perfetto.dev)."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for point in points:
            x, codebook = _draw(point.rows, point.codebook_size, point.dim, str(device))
            with record_function(f"search N={point.rows} K={point.codebook_size} D={point.dim}"):
                fastvq.search(x, codebook)
    profiler.export_chrome_trace(str(path))


def format_table(points: Sequence[Point], found: Limits) -> str:
    """The points as a person reads them."""
    heads = [f"of {name}" for name in found.rates]
    lines = [
        f"{'K':>9}{'D':>6}{'time':>13}{'G/s':>9}" + "".join(f"{head:>12}" for head in heads) + f"{'memory':>13}"
        f"{'naive':>13}{'2nd look':>10}{'float64':>10}"
    ]
    for point in points:
        line = f"{point.codebook_size:>9}{point.dim:>6}{point.p50_ms:>10.3f} ms{point.gops:>9.1f}"
        line += "".join(f"{point.gops / rate:>12.2f}" for rate in found.rates.values())
        line += f"{'-':>13}" if point.peak_mib is None else f"{point.peak_mib:>9.1f} MiB"
        line += f"{point.naive_mib:>8.0f} MiB{' ' if point.naive_measured else '*'}"
        for share in (point.second_look, point.exact):
            line += f"{'-':>10}" if share is None else f"{100 * share:>8.2f} %"
        lines.append(line)
    return "\n".join(lines)


def add_arguments(parser: OneLineParser) -> None:
    """The options of `fastvq profile`."""
    parser.add_argument("--out", type=Path, default=Path("runs/profile"), metavar="DIR", help="(default: runs/profile)")
    parser.add_argument("--rows", type=positive_int, metavar="N", help=f"rows of a search (default: {ROWS})")
    parser.add_argument(
        "--dims", type=positive_int, nargs="+", metavar="D", help=f"(default: {' '.join(map(str, DIMS))})"
    )
    parser.add_argument("--quick", action="store_true", help="three codebooks of one D, and few rows")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Sweep, print, and write the CSV, the picture and the trace."""
    from tqdm import tqdm

    from fastvq.cli.figures import profile_plots

    device = device_of(args)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a folder")
    sizes = QUICK_SIZES if args.quick else SIZES
    dims = args.dims or (QUICK_DIMS if args.quick else DIMS)
    rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    found = limits(device)
    about = machine() | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["cpu"]}
    backend = select.backend_for(None, device).__name__.rsplit(".", 1)[-1]
    print(f"{about['device']}, torch {about['torch']}, fastvq {about['fastvq']}, backend {backend}; {rows} rows")
    rates = ", ".join(f"{rate:,.0f} G operations/s of {name}" for name, rate in found.rates.items())
    print(f"measured limits: copies {found.copy:,.1f} GB/s, {rates}")
    with MemoryMeter(device) as meter:
        grid = [(rows, k, d) for d in dims for k in sizes]
        points = [measure(n, k, d, device, meter) for n, k, d in tqdm(grid, desc="profile", unit="point")]
    print(format_table(points, found))
    print(
        "* two N x K matrices of float32; too large to be made here\n" * any(not p.naive_measured for p in points),
        end="",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    paths = {name: args.out / file for name, file in FILES.items()}
    measured = {"copy_gbs": round(found.copy, 1)} | {f"{n}_gops": round(rate, 1) for n, rate in found.rates.items()}
    common = {"backend": backend, "threads": torch.get_num_threads(), **measured, **about}
    write_csv(paths["csv"], [asdict(point) | common for point in points])
    paths["picture"].write_bytes(profile_plots(points, found))
    trace([point for point in points if point.dim == dims[-1]], device, paths["trace"])
    for path in paths.values():
        print(path)
    return 0
