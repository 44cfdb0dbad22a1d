"""`python -m benchmarks.gpu_check`: everything that only a GPU can tell, in one run of some minutes, offline.

Builds what it can, compares the backends with the reference on the device, tries CUDA graphs, streams and freedom from
host syncs, and times fastvq beside its rivals and the device's measured limits. Writes a JSON file and a Markdown table
to benchmarks/results/gpu. A step that fails is recorded and the rest goes on; the exit status tells. With --dry
the same on the CPU, at tiny shapes, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
SHAPES = (  # N, K, D, dtype
    (1_000_000, 1024, 64, "bfloat16"),
    (1_000_000, 8192, 32, "bfloat16"),
    (1_000_000, 65_536, 64, "bfloat16"),
    (1_000_000, 65_536, 128, "bfloat16"),
    (1_000_000, 20_000, 256, "bfloat16"),
    (262_144, 1024, 256, "float32"),
    (65_536, 8192, 8, "float32"),
    (256, 1024, 64, "float32"),
)
DRY_SHAPES = ((70, 40, 16, "bfloat16"), (33, 20, 8, "float32"))
NAIVE_BYTES = 32 << 30  # largest N x K matrix that the naive versions are asked to make

Record = dict[str, Any]


class Check:
    """The run: the device, and what has been recorded."""

    def __init__(self, dry: bool, seconds: float) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.end = time.monotonic() + seconds
        self.steps: dict[str, Record] = {}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one step, and record what it returns or how it fails."""
        start = time.monotonic()
        if start > self.end:
            self.steps[name] = {"status": "skipped", "why": "out of time"}
            return None
        try:
            result = work()
            self.steps[name] = {"status": "ok", "result": result}
        except Exception:
            result = None
            self.steps[name] = {"status": "failed", "why": traceback.format_exc(limit=8)}
        self.steps[name]["seconds"] = round(time.monotonic() - start, 2)
        print(f"{name}: {self.steps[name]['status']}, {self.steps[name]['seconds']} s", flush=True)
        return result

    def wait(self) -> None:
        """Until the device has finished."""
        if not self.dry:
            torch.cuda.synchronize()


def machine(check: Check) -> Record:
    """What ran, and on what."""
    versions = {}
    for package in ("torch", "triton", "numpy", "vector-quantize-pytorch", "flash-kmeans"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found: Record = {"python": platform.python_version(), "versions": versions, "dry": check.dry}
    if check.dry:
        return found | {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def build(check: Check) -> str:
    """Build the extensions in place where there are compilers; without them the Triton kernels still run."""
    if check.dry:
        return "left as it is"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "built" if done.returncode == 0 else f"not built: {done.stderr[-500:]}"


# ---- right --------------------------------------------------------------------------------------------------------


def cases(check: Check) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Rows and codes of every family and dtype."""
    from families import DTYPES, FAMILIES, make

    shapes = ((20, 33, 7),) if check.dry else ((1023, 777, 31), (257, 4099, 64), (64, 1000, 252))
    kinds = itertools.product(("near_tied",) if check.dry else FAMILIES, DTYPES, shapes)
    for family, dtype, (n, k, d) in kinds:
        x, codebook = make(family, n, k, d, dtype, seed=d)
        yield f"{family} {dtype} {n} x {k} x {d}", x.to(check.device), codebook.to(check.device)


def backends(check: Check) -> dict[str, Any]:
    """The modules that can compute on the device, other than the reference."""
    from fastvq.backends import cuda, triton

    return {"triton": triton} | ({} if check.dry or cuda.missing() else {"cuda": cuda})


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal, NaN to NaN."""
    return found.shape == wanted.shape and bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


def compare(check: Check) -> Record:
    """Each backend's results against the reference's, on the device: how many cases, and which are wrong."""
    from fastvq.backends import reference

    result: Record = {}
    for name, backend in backends(check).items():
        count, wrong = 0, []
        for what, x, codebook in cases(check):
            for metric in ("euclidean", "dot"):
                wanted = reference.search(x, codebook, metric, True, "exact")
                found = backend.search(x, codebook, metric, True, "exact")
                count += 1
                if not all(same(f, w) for f, w in zip(found, wanted, strict=True)):
                    wrong.append(f"search {metric} {what}: {int((found[0] != wanted[0]).sum())} indices differ")
            indices = reference.search(x, codebook, "euclidean", False, "exact")[0]
            # On the CPU the reference adds in the order of the rows; on a GPU, in any.
            wanted = reference.code_sums(x.cpu(), indices.cpu(), len(codebook), None, False)
            found = backend.code_sums(x, indices, len(codebook), None, False)
            if not all(same(f.cpu(), w) for f, w in zip(found, wanted, strict=True)):
                wrong.append(f"code_sums {what}")
            wanted = reference.vector_quantize(x, codebook, "euclidean", 1.0, 0.0, None)
            found = backend.vector_quantize(x, codebook, "euclidean", 1.0, 0.0, None)
            if not all(same(f, w) for f, w in zip(found[:2], wanted[:2], strict=True)):
                wrong.append(f"vector_quantize {what}")
            count += 2
        result[name] = {"cases": count, "wrong": wrong}
        if wrong:
            raise AssertionError(f"{name}: {len(wrong)} of {count} cases wrong: {wrong[:5]}")
    return result


def example(check: Check) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and codes that every step can use."""
    n, k, d = (40, 30, 8) if check.dry else (10_000, 1024, 64)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, d, generator=generator).to(check.device) for rows in (n, k))


def no_sync(check: Check) -> str:
    """The search under torch's guard against host syncs."""
    from fastvq.backends import triton

    x, codebook = example(check)
    triton.search(x, codebook, "euclidean", False, "exact")
    if check.dry:
        return "called without the guard"
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton.search(x, codebook, "euclidean", False, "exact")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def graph(check: Check) -> str:
    """The search captured in a CUDA graph and replayed on other rows, on a stream of its own."""
    from fastvq.backends import reference, triton

    x, codebook = example(check)
    call = lambda: triton.search(x, codebook, "euclidean", False, "exact")[0]  # noqa: E731
    if check.dry:
        call()
        return "called without a graph"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        indices = call()
    x.copy_(torch.randn_like(x))
    captured.replay()
    wanted = reference.search(x, codebook, "euclidean", False, "exact")[0]
    torch.cuda.synchronize()
    if not torch.equal(indices, wanted):
        raise AssertionError(f"{int((indices != wanted).sum())} indices of the replay are wrong")
    return "replayed"


# ---- fast ---------------------------------------------------------------------------------------------------------


def naive(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The matrix of distances and its argmin."""
    return torch.cdist(x, codebook).argmin(-1)


def expanded(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The same by a matrix product in the dtype of the input, as fast code has it."""
    return (codebook.square().sum(-1) - 2 * (x @ codebook.t())).argmin(-1)


def contenders(check: Check, x: torch.Tensor, codebook: torch.Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everyone who searches; the naive ones only where their matrix fits."""
    for name, backend in backends(check).items():
        yield f"fastvq {name}", lambda backend=backend: backend.search(x, codebook, "euclidean", False, "exact")
    if x.shape[0] * codebook.shape[0] * 4 <= NAIVE_BYTES:
        yield "naive cdist", lambda: naive(x.float(), codebook.float())
        yield "naive matmul", lambda: expanded(x, codebook)
        compiled = torch.compile(expanded, backend="eager" if check.dry else "inductor", dynamic=False)
        yield "torch.compile of naive matmul", lambda: compiled(x, codebook)
        if importlib.util.find_spec("vector_quantize_pytorch"):
            from vector_quantize_pytorch import VectorQuantize

            layer = VectorQuantize(dim=x.shape[1], codebook_size=codebook.shape[0]).to(x.device).eval()
            layer._codebook.embed.data.copy_(codebook[None])
            rows = x.float()[None]
            yield "vector-quantize-pytorch", lambda: layer(rows)
    if not check.dry and importlib.util.find_spec("flash_kmeans"):
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        squares = x.float().square().sum(-1)[None]
        rows, codes = x[None].contiguous(), codebook[None].contiguous()
        yield "flash-kmeans", lambda: euclid_assign_triton(rows, codes, squares)


def timings(check: Check, limits: Record) -> list[Record]:
    """Milliseconds of every contender at every shape, its rate, and its part of what the device can do."""
    from fastvq.measure.device import median_milliseconds

    rows = []
    for n, k, d, dtype in DRY_SHAPES if check.dry else SHAPES:
        x, codebook = (torch.randn(rows, d, device=check.device).to(getattr(torch, dtype)) for rows in (n, k))
        for name, call in contenders(check, x, codebook):
            row: Record = {"N": n, "K": k, "D": d, "dtype": dtype, "contender": name}
            if time.monotonic() > check.end:
                row["why"] = "out of time"
            else:
                try:
                    with torch.no_grad():
                        took = median_milliseconds(call, check.device, calls=1 if check.dry else 7)
                    moved = (n + k) * d * x.element_size() + 8 * n  # read once, and the indices written
                    figures = {"ms": took, "tflops": 2 * n * k * d / took / 1e9}
                    figures["of_matrix_rate"] = figures["tflops"] * 1000 / limits["matrix_gflops"]
                    figures["of_bandwidth"] = moved / took / 1e6 / limits["copy_gbs"]
                    row |= {name: float(f"{value:.4g}") for name, value in figures.items()}
                except Exception as error:
                    row["why"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(row)
    return rows


def measure_limits(check: Check) -> Record:
    """The device's copy bandwidth in GB/s and matrix rate in GFLOP/s, float16 on a GPU."""
    from fastvq.measure.device import limits

    found = limits(check.device)
    return {"copy_gbs": found.copy, "matrix_gflops": max(found.rates.values()), "rates": found.rates}


# ---- written down -------------------------------------------------------------------------------------------------


def markdown(report: Record) -> str:
    """The report as a page."""
    about = report["machine"]
    lines = [f"# {about['device']}", "", f"{json.dumps(about['versions'])}{', a dry run' if about['dry'] else ''}", ""]
    lines += ["| step | | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {step['status']} | {step.get('seconds', '')} |" for name, step in report["steps"].items()]
    timed = report["steps"].get("timings", {}).get("result") or []
    lines += [
        "",
        "| N, K, D | dtype | contender | ms | TFLOP/s | of the matrix rate | of the bandwidth |",
        "|---" * 7 + "|",
    ]
    for row in timed:
        shape = f"{row['N']}, {row['K']}, {row['D']}"
        cells = [row.get(name, row.get("why", "-")) for name in ("ms", "tflops", "of_matrix_rate", "of_bandwidth")]
        lines.append(f"| {shape} | {row['dtype']} | {row['contender']} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def prepare(dry: bool) -> None:
    """Make the data families importable, the package where it is not installed, and the interpreter for --dry."""
    sys.path[:0] = [str(ROOT / "tests")]
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.cure()
    if importlib.util.find_spec("fastvq") is None or importlib.util.find_spec("fastvq.kernels") is None:
        staged = ROOT / "build" / "gpu_check" / "fastvq"
        staged.mkdir(parents=True, exist_ok=True)
        for entry in [*(ROOT / "fastvq").iterdir(), ROOT / "kernels"]:
            if not (staged / entry.name).exists():
                (staged / entry.name).symlink_to(entry)
        for name in [name for name in sys.modules if name.split(".")[0] == "fastvq"]:
            del sys.modules[name]
        sys.path[:0] = [str(staged.parent)]


def main() -> int:
    """Run all steps, write the files, and return 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and Markdown files")
    parser.add_argument("--seconds", type=float, default=540.0, help="no further step or timing begins after that")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        print("no GPU that torch can use; --dry runs the same on the CPU", file=sys.stderr)
        return 2
    check = Check(options.dry, options.seconds)
    built = None if options.dry else check.step("build", lambda: build(check))
    prepare(options.dry)
    about = machine(check)
    check.step("compare", lambda: compare(check))
    check.step("host syncs", lambda: no_sync(check))
    check.step("graph", lambda: graph(check))
    limits = check.step("limits", lambda: measure_limits(check))
    if limits:
        check.step("timings", lambda: timings(check, limits))
    report = {"machine": about, "built": built, "steps": check.steps}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "".join(c if c.isalnum() else "-" for c in f"{'dry' if options.dry else about['device']}").lower()
    (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{stem}.md").write_text(markdown(report), encoding="utf-8")
    failed = [name for name, step in check.steps.items() if step["status"] == "failed"]
    for name in failed:
        print(f"{name}:\n{check.steps[name]['why']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
