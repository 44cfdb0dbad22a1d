"""`fastvq bench`: fastvq against its rivals in plain PyTorch, call by call in turn, on this machine."""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvq
from fastvq.data.errors import UserError
from fastvq.info import processor

Shape = tuple[int, int, int]  # N rows, K codes, D dimensions
Work = Callable[[], object]  # one call of what is measured, on data made before

SHAPES: tuple[Shape, ...] = (
    (16384, 1024, 64),
    (16384, 8192, 32),
    (16384, 1024, 256),
    (65536, 1024, 8),
    (4096, 65536, 64),
    (256, 1024, 64),
)
QUICK_SHAPES: tuple[Shape, ...] = ((16384, 1024, 64), (65536, 1024, 8), (256, 1024, 64))
OPERATIONS = ("search", "step")
CONTENDERS = ("fastvq", "naive", "chunked", "peer")
DECAY, EPS = 0.99, 1e-5

# glibc gives large blocks back to the system and faults them in again at every step; the naive version suffers most.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
# Every large block is mapped by itself, so that the resident set is what is alive, not what malloc holds back.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "kept": KEEP_MEMORY}

# ---- search -----------------------------------------------------------------------------------------------------


def naive_search(x: Tensor, codebook: Tensor) -> Tensor:
    """The distance matrix (N, K) and its argmin, as most VQ-VAE code has it."""
    distances = x.square().sum(1, keepdim=True) - 2 * x @ codebook.t() + codebook.square().sum(1)
    return distances.argmin(1)


def chunked_search(x: Tensor, codebook: Tensor) -> Tensor:
    """The best plain PyTorch: scores of some rows at a time in one scratch block, no ||x||^2, no N x K."""
    rows = min(x.shape[0], max(128, min(1024, (1 << 24) // codebook.shape[0])))  # the fastest of 32 to 1024 here
    bias, codes = codebook.square().sum(1).mul_(-0.5), codebook.t()
    scratch = x.new_empty(rows, codebook.shape[0])
    indices = torch.empty(x.shape[0], dtype=torch.int64)
    for start in range(0, x.shape[0], rows):
        block = x[start : start + rows]
        scores = torch.addmm(bias, block, codes, out=scratch[: block.shape[0]])
        torch.argmax(scores, 1, out=indices[start : start + rows])
    return indices


def _gaussian(shape: Shape) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    n, k, d = shape
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def _peer(shape: Shape, codebook: Tensor) -> torch.nn.Module:
    """vector-quantize-pytorch with our codes; straight-through, as the others, not its rotation trick."""
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(shape[2], shape[1], decay=DECAY, eps=EPS, rotation_trick=False)
    layer._codebook.embed.copy_(codebook)
    layer._codebook.embed_avg.copy_(codebook)
    layer._codebook.cluster_size.fill_(1)
    return layer


def search_work(contender: str, shape: Shape) -> Work:
    """One search of N rows. The peer has no search by itself: its evaluation forward comes nearest."""
    x, codebook = _gaussian(shape)
    if contender == "peer":
        layer = _peer(shape, codebook).eval()
        return torch.no_grad()(lambda: layer(x.unsqueeze(0)))
    searches: dict[str, Callable[..., object]] = {
        "fastvq": fastvq.search,
        "naive": naive_search,
        "chunked": chunked_search,
    }
    return functools.partial(searches[contender], x, codebook)


# ---- training step ----------------------------------------------------------------------------------------------


Layer = Callable[[Tensor], tuple[Tensor, Tensor]]  # x (N, D) to quantized (N, D) and the commitment loss


class _State:
    """A VQ layer's state in plain tensors: the codebook and its moving averages."""

    def __init__(self, shape: Shape, codebook: Tensor) -> None:
        self.codebook = codebook.clone()
        self.cluster_size = codebook.new_ones(codebook.shape[0])
        self.embed_avg = codebook.clone()

    def refresh(self, counts: Tensor, sums: Tensor) -> None:
        """The EMA update, as plain PyTorch."""
        self.cluster_size.mul_(DECAY).add_(counts, alpha=1 - DECAY)
        self.embed_avg.mul_(DECAY).add_(sums, alpha=1 - DECAY)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + EPS) / (total + self.cluster_size.shape[0] * EPS) * total
        torch.div(self.embed_avg, smoothed.unsqueeze(1), out=self.codebook)


class FusedLayer(_State):
    """fastvq's functions."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        quantized, indices, loss = fastvq.vector_quantize(x, self.codebook)
        counts, sums = fastvq.code_sums(x, indices, self.codebook.shape[0])
        fresh = torch.empty_like(self.codebook)  # the backward pass needs the codes of this forward pass
        fastvq.ema_update_(fresh, self.cluster_size, self.embed_avg, counts, sums, decay=DECAY, eps=EPS)
        self.codebook = fresh
        return quantized, loss


class NaiveLayer(_State):
    """The usual way: one-hot matrix (N, K), one matmul to gather and one to sum."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        with torch.no_grad():
            indices = naive_search(x, self.codebook)
            one_hot = x.new_zeros(x.shape[0], self.codebook.shape[0]).scatter_(1, indices.unsqueeze(1), 1)
            codes = one_hot @ self.codebook
            self.refresh(one_hot.sum(0), one_hot.t() @ x)
        loss = torch.nn.functional.mse_loss(x, codes)
        return x + (codes - x).detach(), loss


class ChunkedLayer(_State):
    """The best plain PyTorch: search in chunks, gather by index_select, sum by index_add_."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        with torch.no_grad():
            indices = chunked_search(x, self.codebook)
            codes = self.codebook.index_select(0, indices)
            counts = torch.bincount(indices, minlength=self.codebook.shape[0])
            self.refresh(counts, torch.zeros_like(self.codebook).index_add_(0, indices, x))
        loss = torch.nn.functional.mse_loss(x, codes)
        return x + (codes - x).detach(), loss


class PeerLayer:
    """vector-quantize-pytorch in training."""

    def __init__(self, shape: Shape, codebook: Tensor) -> None:
        self.layer = _peer(shape, codebook).train()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise (N, D), update the codebook; quantized (N, D) and the commitment loss."""
        quantized, _, loss = self.layer(x.unsqueeze(0))
        return quantized.squeeze(0), loss


def step_work(contender: str, shape: Shape) -> Work:
    """One training step of the layer: forward, EMA update, backward to x."""
    x, codebook = _gaussian(shape)
    upstream = torch.full_like(x, 1e-3)
    layers: dict[str, Callable[[Shape, Tensor], Layer]] = {
        "fastvq": FusedLayer,
        "naive": NaiveLayer,
        "chunked": ChunkedLayer,
        "peer": PeerLayer,
    }
    layer = layers[contender](shape, codebook)

    def step() -> Tensor:
        leaf = x.detach().requires_grad_()
        quantized, loss = layer(leaf)
        (grad,) = torch.autograd.grad([quantized, loss], [leaf], [upstream, torch.ones_like(loss)])
        return grad

    return step


def work(operation: str, contender: str, shape: Shape) -> Work:
    """What is measured: `operation` "search" or "step", as `contender` does it."""
    return {"search": search_work, "step": step_work}[operation](contender, shape)


# ---- measuring --------------------------------------------------------------------------------------------------


def available() -> list[str]:
    """The contenders that can run here: all, the peer only where it is installed."""
    return [name for name in CONTENDERS if name != "peer" or util.find_spec("vector_quantize_pytorch")]


def interleave(works: dict[str, Work], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call, sorted: A B C A B C ..., so that a slow moment of the machine hits all alike.

    Args:
        works: what to call, by name; each is called once before, to warm up.
        seconds: for all rounds together; at least three rounds whatever they take.
    """
    for call in works.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in works}
    deadline = time.perf_counter() + seconds
    for done in itertools.count():
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name, call in works.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(values) for name, values in times.items()}


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile of sorted values."""
    return values[max(0, -(-len(values) * percent // 100) - 1)]


def _table(operation: str, shapes: Iterable[Shape], seconds: float) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes:
        times = interleave({name: work(operation, name, shape) for name in available()}, seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append(dict(zip("NKD", shape, strict=True)) | {f"{name}_ms": medians.get(name) for name in CONTENDERS})
    return rows


def search_table(shapes: Iterable[Shape], seconds: float = 2.0) -> list[dict[str, Any]]:
    """Median milliseconds of a search, a row a shape: N, K, D, fastvq_ms, naive_ms, chunked_ms, peer_ms.

    Args:
        shapes: (N, K, D) each.
        seconds: for each shape, all contenders together.

    Returns:
        One dict a shape; peer_ms is None where vector-quantize-pytorch is not installed.
    """
    return _table("search", shapes, seconds)


def step_table(shapes: Iterable[Shape], seconds: float = 2.0) -> list[dict[str, Any]]:
    """The same as `search_table` for a whole training step of the layer: forward, backward, EMA update."""
    return _table("step", shapes, seconds)


# ---- peak memory and other processes ----------------------------------------------------------------------------


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_kib_of(call: Work) -> int:
    """How far one call raises the resident set above where it stood before it, in KiB. Linux only."""
    before = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    result = call()
    peak = _status_kib("VmHWM")
    del result
    return max(0, peak - before)


def _in_child(function: str, *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """What `function` of this module returns in a fresh process, with the same number of threads."""
    code = (
        "import json, sys, torch\nfrom fastvq.cli import bench\n"
        "name, threads, arguments = json.loads(sys.argv[1])\ntorch.set_num_threads(threads)\n"
        "print(json.dumps(getattr(bench, name)(*arguments)))"
    )
    payload = json.dumps([function, torch.get_num_threads(), arguments])
    command = [sys.executable, "-c", code, payload]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _peak_here(operation: str, contender: str, shape: Sequence[int]) -> float:
    n, k, d = shape
    work(operation, contender, (16, 16, d))()  # threads, libraries and autograd, not the operation, cost this much
    return peak_kib_of(work(operation, contender, (n, k, d))) / 1024


def peak_mib(operation: str, contender: str, shape: Shape) -> float | None:
    """Peak memory of one call above its inputs, results included, in MiB; None where the system cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    return _in_child("_peak_here", operation, contender, shape, environment=RETURN_MEMORY)


def _times_here(operation: str, shape: Sequence[int], seconds: float) -> dict[str, list[float]]:
    n, k, d = shape
    return interleave({name: work(operation, name, (n, k, d)) for name in available()}, seconds)


# ---- records ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions."""
    peer = metadata.version("vector-quantize-pytorch") if "peer" in available() else ""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastvq": fastvq.__version__,
        "peer": peer,
    }


def records(shapes: Iterable[Shape], seconds: float, operations: Iterable[str] = OPERATIONS) -> list[dict[str, Any]]:
    """One record for each operation, shape, allocator and contender: p20, p50, p80 and peak memory."""
    rows = []
    for operation, shape in itertools.product(operations, shapes):
        peaks = {name: peak_mib(operation, name, shape) for name in available()}
        for allocator, environment in ALLOCATORS.items():
            times = _in_child("_times_here", operation, shape, seconds, environment=environment)
            for name, values in times.items():
                row: dict[str, Any] = {"operation": operation, **dict(zip("NKD", shape, strict=True))}
                row |= {"allocator": allocator, "contender": name, "rounds": len(values)}
                row |= {f"p{p}_ms": round(percentile(values, p), 4) for p in (20, 50, 80)}
                row["ratio"] = round(statistics.median(values) / statistics.median(times["fastvq"]), 2)
                peak = peaks[name]
                row["peak_mib"] = None if peak is None else round(peak, 1)
                rows.append(row | machine())
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the records, a line each, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


# ---- command ----------------------------------------------------------------------------------------------------


def machine_line() -> str:
    """One line that says where the figures come from."""
    about = machine()
    peer = f", vector-quantize-pytorch {about['peer']}" if about["peer"] else ""
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    return f"{about['cpu']}, {threads}, torch {about['torch']}, fastvq {about['fastvq']}{peer}"


def format_table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Median milliseconds, each rival's with how many times as long it takes."""
    lines = [f"{title:<24}" + "".join(f"{name:>20}" for name in CONTENDERS)]
    for row in rows:
        line = f"{row['N']:>8}{row['K']:>8}{row['D']:>8}{row['fastvq_ms']:>17.3f} ms"
        for name in CONTENDERS[1:]:
            took = row[f"{name}_ms"]
            line += f"{'-':>20}" if took is None else f"{took:>12.3f}{took / row['fastvq_ms']:>7.1f}x"
        lines.append(line)
    return "\n".join(lines)


def medians_of(rows: Sequence[dict[str, Any]], operation: str, allocator: str = "default") -> list[dict[str, Any]]:
    """Records as the rows of `search_table` and `step_table`."""
    table: dict[Shape, dict[str, Any]] = {}
    for row in rows:
        if row["operation"] == operation and row["allocator"] == allocator:
            key = (row["N"], row["K"], row["D"])
            line = table.setdefault(key, dict(zip("NKD", key, strict=True)) | {f"{n}_ms": None for n in CONTENDERS})
            line[f"{row['contender']}_ms"] = row["p50_ms"]
    return list(table.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastvq bench`."""
    parser.add_argument("--quick", action="store_true", help="three shapes, half a second each")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="measure p20, p50, p80, peak memory and both allocators; write them"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the file if one was asked for."""
    if args.csv is not None and args.csv.is_dir():
        raise UserError(f"--csv must name a file; got the directory {args.csv}")
    shapes, seconds = (QUICK_SHAPES, 0.5) if args.quick else (SHAPES, 5.0)
    print(machine_line())
    print("Medians of calls taken in turn; x: times as long as fastvq.")
    if args.csv is None:
        print(f"\n{format_table('search: N, K, D', search_table(shapes, seconds))}", flush=True)
        print(f"\n{format_table('training step: N, K, D', step_table(shapes, seconds))}")
        return 0
    rows = records(shapes, seconds)
    for allocator in ALLOCATORS:
        print(f"\nmalloc: {allocator}")
        print(format_table("search: N, K, D", medians_of(rows, "search", allocator)))
        print(format_table("training step: N, K, D", medians_of(rows, "step", allocator)))
    write_csv(args.csv, rows)
    print(f"\nwrote {args.csv}")
    return 0
