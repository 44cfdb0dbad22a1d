"""`fastvq bench`: fastvq against its rivals and against the limits of this machine, call by call in turn."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvq.backends import cpu
from fastvq.cli.parser import OneLineParser
from fastvq.data.errors import UserError
from fastvq.measure import contenders, memory
from fastvq.measure.contenders import OPERATORS, RESIDUALS, SEARCHES, STEPS, UNITS, available
from fastvq.measure.data import FAMILIES, Shape
from fastvq.measure.table import Row, machine, read_csv, write_csv
from fastvq.measure.timing import Turn, Work, interleave, medians, percentile
from fastvq.measure.worker import ALLOCATORS, RETURN_MEMORY, Worker

SEARCH_SHAPES: tuple[Shape, ...] = (
    (16384, 1024, 64),
    (16384, 8192, 32),
    (16384, 1024, 256),
    (16384, 1024, 128),
    (4096, 65536, 64),
    (65536, 1024, 8),
    (16384, 16384, 8),
    (256, 1024, 64),
)
STEP_SHAPES: tuple[Shape, ...] = (
    (16384, 1024, 64),
    (16384, 8192, 32),
    (16384, 1024, 256),
    (65536, 1024, 8),
    (4096, 65536, 64),
    (256, 1024, 64),
)
QUICK_SHAPES: tuple[Shape, ...] = ((16384, 1024, 64), (256, 1024, 64))
CHANGED, UNCHANGED = "codebook changed", "codebook unchanged"  # before each call
SMALL_ROWS = 1024  # up to so many rows a codebook that does not change matters: a streaming codec
LARGEST: Shape = (65536, 65536, 64)  # whose memory is measured; the naive version would need 32 GiB and more
MOST_NAIVE_BYTES = 4 << 30  # of an N x K matrix that is still made to see its memory
RESIDUAL_BATCH, RESIDUAL_STAGES, RESIDUAL_SHAPE = (8, 750), 8, (6000, 1024, 128)
MODEL_IMAGES, MODEL_SIDE, MODEL_SHAPE = 16, 128, (16384, 1024, 64)
FLOAT32_KERNELS = {"avx512vnni": "avx512", "avxvnni": "avx2"}  # the same kernel less its int8 screen

Times = Mapping[str, Sequence[float]]  # milliseconds of every call, sorted, by contender

# ---- rows -------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("part", "case", "N", "K", "D", "allocator", "threads", "contender", "calls", "p20_ms", "p50_ms", "p80_ms"),
    *("ratio", "gflops", "of_float32_peak", "of_int8_peak", "gbs", "peak_mib"),
)


@dataclass(frozen=True)
class Group:
    """What the rows of contenders that took turns have in common."""

    part: str
    shape: Shape
    case: str = ""
    allocator: str = "default"
    threads: int | None = None  # None: as many as torch has here

    @property
    def thread_count(self) -> int:
        """How many threads each contender has."""
        return self.threads or torch.get_num_threads()

    def row(self, contender: str, **values: Any) -> Row:
        """A row of the file; columns without a value are empty."""
        n, k, d = self.shape
        common = {"part": self.part, "case": self.case, "N": n, "K": k, "D": d, "allocator": self.allocator}
        common |= {"threads": self.thread_count, "contender": contender}
        return dict.fromkeys(COLUMNS, "") | common | values | machine()

    def rows(self, times: Times, searches: int = 0, moved: Mapping[str, int] | None = None) -> list[Row]:
        """A row a contender: percentiles, and how many times as long as fastvq it takes.

        Args:
            times: of every contender, those of `peak_turns` among them.
            searches: searches of this shape in a call, for the effective rate 2 N K D / t; 0 where a call is more.
            moved: bytes that a call must read and write, of the contenders whose rate that is instead.
        """
        moved = moved or {}
        median = {name: percentile(values, 50) for name, values in times.items()}  # as the file has it
        n, k, d = self.shape
        rates = {name: searches * 2 * n * k * d / median[name] / 1e6 for name in times}
        peaks = {unit: f"{unit} peak" for unit in UNITS if f"{unit} peak" in times}
        for unit, name in peaks.items():
            rates[name] = contenders.peak_operations(unit, self.thread_count) / median[name] / 1e6
        rows = []
        for name, values in times.items():
            row = self.row(
                name, calls=len(values), **{f"p{p}_ms": round(percentile(values, p), 4) for p in (20, 50, 80)}
            )
            if name in moved:
                row["gbs"] = round(moved[name] / median[name] / 1e6, 1)
            elif searches or name in peaks.values():
                row["gflops"] = round(rates[name], 1)
            if name not in (*peaks.values(), "copy"):
                row["ratio"] = round(median[name] / median["fastvq"], 3)
                if searches and name not in moved:
                    row |= {f"of_{unit}_peak": round(rates[name] / rates[peak], 3) for unit, peak in peaks.items()}
            rows.append(row)
        return rows


# ---- parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    quick: bool

    def shapes(self, shapes: Sequence[Shape]) -> Sequence[Shape]:
        """Those to measure."""
        return QUICK_SHAPES if self.quick else shapes

    def search_cases(self) -> list[tuple[Shape, bool]]:
        """The shapes to search, and whether the codebook changes before each call: for a few rows, also where not."""
        shapes = self.shapes(SEARCH_SHAPES)
        return [(shape, True) for shape in shapes] + [(shape, False) for shape in shapes if shape[0] <= SMALL_ROWS]

    def interleave(self, turns: Mapping[Any, Turn], seconds: float) -> dict[Any, list[float]]:
        """As `timing.interleave`; when quick, one round."""
        return interleave(turns, 0, 1) if self.quick else interleave(turns, seconds)


def _peak_turns(worker: Worker, key: Callable[[str], Any]) -> dict[Any, Turn]:
    """The loops that show what the machine can do, as contenders; key(name) each."""
    units = [unit for unit in UNITS if contenders.peak_operations(unit, 1)]
    return {key(f"{unit} peak"): worker.turn(contenders.peak_work, unit) for unit in units}


@contextlib.contextmanager
def _by_allocator() -> Iterator[dict[str, Worker]]:
    """A worker for each setting of malloc."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Worker(environment)) for name, environment in ALLOCATORS.items()}


def _of(allocator: str, times: Mapping[tuple[str, str], list[float]]) -> dict[str, list[float]]:
    """The times of one allocator's contenders."""
    return {name: values for (where, name), values in times.items() if where == allocator}


def search_part(plan: Plan) -> Iterator[list[Row]]:
    """Search against every rival and the machine's peaks, under both allocators."""
    for shape, changed in plan.search_cases():
        with _by_allocator() as workers:
            turns: dict[tuple[str, str], Turn] = {}
            for allocator, worker in workers.items():
                for name in available(SEARCHES):
                    make = contenders.search_work, name, shape, "gaussian", changed
                    turns[allocator, name] = worker.turn(*make)
                turns |= _peak_turns(worker, lambda name, where=allocator: (where, name))  # type: ignore[misc]
            times = plan.interleave(turns, 8)
        case = CHANGED if changed else UNCHANGED
        for allocator in workers:
            yield Group("search", shape, case, allocator).rows(_of(allocator, times), searches=1)


def step_part(plan: Plan) -> Iterator[list[Row]]:
    """The training step of the layer, forward, EMA update and backward, under both allocators."""
    for shape in plan.shapes(STEP_SHAPES):
        with _by_allocator() as workers:
            turns = {
                (allocator, name): worker.turn(contenders.step_work, name, shape)
                for allocator, worker in workers.items()
                for name in available(STEPS)
            }
            times = plan.interleave(turns, 8)
        for allocator in workers:
            yield Group("step", shape, "", allocator).rows(_of(allocator, times))


def operators_part(plan: Plan) -> Iterator[list[Row]]:
    """The operators of fastvq's training step by themselves, beside the whole, the machine's peaks and a copy."""
    for shape in plan.shapes(STEP_SHAPES):
        with Worker() as worker:
            turns: dict[str, Turn] = {"fastvq": worker.turn(contenders.step_work, "fastvq", shape)}
            for name in ("search", *OPERATORS):
                turns[name] = worker.turn(contenders.operator_work, name, shape)
            turns |= _peak_turns(worker, lambda name: name)
            turns["copy"] = worker.turn(contenders.copy_work)
            times = plan.interleave(turns, 6)
        moved = contenders.operator_bytes(shape) | {"copy": contenders.COPY_BYTES}
        yield Group("operators", shape).rows(times, searches=1, moved=moved)


def data_part(plan: Plan) -> Iterator[list[Row]]:
    """fastvq's search on data of every kind, and its float32 kernel beside it, where int8 is what screens."""
    isa = "" if cpu.missing() else cpu.extension().instruction_set()
    settings: dict[str, dict[str, str]] = {"fastvq": {}}
    if isa in FLOAT32_KERNELS:
        settings["float32 kernel"] = {"FASTVQ_CPU_ISA": FLOAT32_KERNELS[isa]}
    for shape, changed in plan.search_cases():
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(settings[name])) for name in settings}
            turns = {
                (family, name): worker.turn(contenders.search_work, "fastvq", shape, family, changed)
                for family in FAMILIES
                for name, worker in workers.items()
            }
            times = plan.interleave(turns, 15)
        for family in FAMILIES:
            case = family if changed else f"{family}, {UNCHANGED}"
            yield Group("data", shape, case).rows(_of(family, times), searches=1)


def residual_part(plan: Plan) -> Iterator[list[Row]]:
    """A residual quantiser in evaluation, all its stages, under both allocators."""
    stages, shape = RESIDUAL_STAGES, RESIDUAL_SHAPE
    with _by_allocator() as workers:
        turns = {
            (allocator, name): worker.turn(contenders.residual_work, name, RESIDUAL_BATCH, stages, shape)
            for allocator, worker in workers.items()
            for name in available(RESIDUALS)
        }
        times = plan.interleave(turns, 8)
    for allocator in workers:
        yield Group("residual", shape, f"Q = {stages}", allocator).rows(_of(allocator, times), searches=stages)


def _on_threads(threads: int, make: Callable[..., Work], *arguments: Any) -> Work:
    work = make(*arguments)

    def before() -> None:
        torch.set_num_threads(threads)
        work.before()

    return Work(work.call, before)


def threads_part(plan: Plan) -> Iterator[list[Row]]:
    """fastvq on one thread and on all, beside what the machine's own multiply-adds gain."""
    every = torch.get_num_threads()
    tasks: list[tuple[str, Shape, int, tuple[Any, ...]]] = [
        ("search", shape, 1, (contenders.search_work, "fastvq", shape)) for shape in plan.shapes(SEARCH_SHAPES)
    ]
    tasks += [("step", shape, 0, (contenders.step_work, "fastvq", shape)) for shape in plan.shapes(STEP_SHAPES[:3])]
    residual = contenders.residual_work, "fastvq", RESIDUAL_BATCH, RESIDUAL_STAGES, RESIDUAL_SHAPE
    tasks.append(("residual", RESIDUAL_SHAPE, RESIDUAL_STAGES, residual))
    numbers = sorted({1, every})
    for case, shape, searches, make in tasks:
        with Worker() as worker:
            turns = {(number, "fastvq"): worker.turn(_on_threads, number, *make) for number in numbers}
            for unit in UNITS:
                if contenders.peak_operations(unit, 1):
                    for number in numbers:
                        key = number, f"{unit} peak"
                        turns[key] = worker.turn(_on_threads, number, contenders.peak_work, unit)
            times = plan.interleave(turns, 3)
        for number in numbers:
            mine = {name: values for (threads, name), values in times.items() if threads == number}
            yield Group("threads", shape, case, threads=number).rows(mine, searches)


def model_part(plan: Plan) -> Iterator[list[Row]]:
    """Forward and backward of a small convolutional model with the layer, without it, and the layer by itself."""
    with Worker() as worker:
        turns = {
            name: worker.turn(contenders.model_work, name, MODEL_IMAGES, MODEL_SIDE, MODEL_SHAPE)
            for name in available(contenders.MODELS)
        }
        times = plan.interleave(turns, 20)
    yield Group("model", MODEL_SHAPE, f"{MODEL_IMAGES} images of {MODEL_SIDE} pixels").rows(times)


def _peak_here(operation: str, contender: str, shape: Shape) -> float:
    make = {"search": contenders.search_work, "step": contenders.step_work}[operation]
    make(contender, (16, 16, shape[2])).call()  # threads, libraries and autograd, not the operation, cost this much
    return memory.peak_mib(make(contender, shape).call)


def memory_part(plan: Plan) -> Iterator[list[Row]]:
    """Peak memory of one call above its inputs, its results included."""
    if not memory.measurable():
        return
    for shape in (*plan.shapes(SEARCH_SHAPES), LARGEST):
        small = shape[0] * shape[1] * 4 <= MOST_NAIVE_BYTES
        for operation in ("search", "step"):
            group = Group("memory", shape, operation)
            with Worker(RETURN_MEMORY) as worker:
                yield [
                    group.row(name, peak_mib=round(worker.call(_peak_here, operation, name, shape), 1))
                    for name in ("fastvq", "naive")
                    if small or name == "fastvq"
                ]


PARTS: dict[str, Callable[[Plan], Iterator[list[Row]]]] = {
    "search": search_part,
    "step": step_part,
    "operators": operators_part,
    "data": data_part,
    "residual": residual_part,
    "threads": threads_part,
    "model": model_part,
    "memory": memory_part,
}


# ---- in this process: for the report of `fastvq demo` -----------------------------------------------------------


def _table(
    make: Callable[[str, Shape], Work], names: tuple[str, ...], shapes: Iterable[Shape], seconds: float
) -> list[Row]:
    rows = []
    for shape in shapes:
        times = interleave({name: make(name, shape).turn for name in available(names)}, seconds)
        median = medians(times)
        rows.append(dict(zip("NKD", shape, strict=True)) | {f"{name}_ms": median.get(name) for name in names})
    return rows


def search_table(shapes: Iterable[Shape], seconds: float = 2.0) -> list[Row]:
    """Median milliseconds of a search, a row a shape: N, K, D, fastvq_ms, naive_ms, chunked_ms, faiss_ms, peer_ms.

    Args:
        shapes: (N, K, D) each.
        seconds: for each shape, all contenders together.

    Returns:
        One dict a shape; None for a contender whose package is not installed.
    """
    return _table(contenders.search_work, SEARCHES, shapes, seconds)


def step_table(shapes: Iterable[Shape], seconds: float = 2.0) -> list[Row]:
    """The same as `search_table` for a whole training step of the layer: forward, backward, EMA update."""
    return _table(contenders.step_work, STEPS, shapes, seconds)


def machine_line() -> str:
    """One line that says where the figures come from."""
    about = machine()
    names = {"faiss": "faiss", "peer": "vector-quantize-pytorch"}
    rivals = "".join(f", {name} {about[key]}" for key, name in names.items() if about[key])
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    return f"{about['cpu']}, {threads}, torch {about['torch']}, fastvq {about['fastvq']}{rivals}"


# ---- command ----------------------------------------------------------------------------------------------------


def format_group(rows: Sequence[Row]) -> str:
    """A group of rows as a person reads it."""
    first = rows[0]
    words = [f"{first['N']} x {first['K']} x {first['D']}", first["case"], f"malloc: {first['allocator']}"]
    words.append(f"{first['threads']} thread{'s' * (first['threads'] != 1)}")
    lines = [f"{first['part']} " + ", ".join(word for word in words if word)]
    for row in rows:
        line = f"  {row['contender']:<15}"
        if row["p50_ms"] != "":
            line += f"{row['p50_ms']:>11.3f} ms"
        if row["ratio"] != "":
            line += f"{row['ratio']:>9.2f}x"
        if row["gflops"] != "":
            line += f"{'' if row['ratio'] != '' else ' ' * 10}{row['gflops']:>10.1f} G/s"
        if row["of_float32_peak"] != "":
            line += f"{row['of_float32_peak']:>8.2f} of the float32 peak"
        if row["gbs"] != "":
            line += f"{row['gbs']:>10.1f} GB/s"
        if row["peak_mib"] != "":
            line += f"{row['peak_mib']:>10.1f} MiB"
        lines.append(line)
    return "\n".join(lines)


def add_arguments(parser: OneLineParser) -> None:
    """The options of `fastvq bench`."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="two shapes, one round: a minute or two")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows; other parts that are there stay")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the file, part by part, if one was asked for."""
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        raise UserError(f"PART must be one of {', '.join(PARTS)}; got {unknown[0]}")
    if args.csv is not None and args.csv.is_dir():
        raise UserError(f"--csv must name a file; got the directory {args.csv}")
    kept = _rows_of(args.csv) if args.csv is not None else []
    start = time.perf_counter()
    print(machine_line())
    print("Medians of calls taken in turn; x: times as long as fastvq; G/s: 2 N K D / t; GB/s: read and written.")
    for part in [name for name in PARTS if name in (args.parts or PARTS)]:
        measured = []
        for rows in PARTS[part](Plan(args.quick)):
            print(f"\n{format_group(rows)}", flush=True)
            measured += rows
        if args.csv is not None:
            kept = [row for row in kept if row["part"] != part] + measured
            order = list(PARTS)
            kept.sort(key=lambda row: order.index(row["part"]))
            write_csv(args.csv, kept)
    print(f"\n{time.perf_counter() - start:.0f} seconds")
    if args.csv is not None:
        print(f"wrote {args.csv}")
    return 0


def _rows_of(path: Path) -> list[Row]:
    """The rows that are in the file already.

    Raises:
        UserError: it is a file of something else.
    """
    if not path.exists():
        return []
    rows: list[Row] = list(read_csv(path))
    if rows and (set(rows[0]) != {*COLUMNS, *machine()} or not {row["part"] for row in rows} <= PARTS.keys()):
        raise UserError(f"--csv {path} holds other columns than fastvq bench writes; name another file")
    return rows
