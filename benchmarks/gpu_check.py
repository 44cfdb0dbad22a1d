"""`python -m benchmarks.gpu_check`: everything that only a GPU can tell, in one run of some minutes, offline.

Builds what it can, compares the indices of all backends, times fastvq beside its rivals and the device's measured
limits (search, training step, residual quantiser, each kernel of a call, what other tiles would give), runs every CUDA
operator under compute-sanitizer where that is installed, and the kernels' tests on the device: equal to the reference;
graphs, streams, no host sync. Writes a JSON file and a Markdown table to benchmarks/results/gpu.
A step that fails is recorded and the rest goes on; the exit status tells. With --dry the same on the CPU, at tiny
shapes, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
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
STAGED = ROOT / "build" / "gpu_check"
SHAPES = (  # N, K, D, dtype
    (1_000_000, 1024, 64, "bfloat16"),
    (1_000_000, 8192, 32, "bfloat16"),
    (1_000_000, 65_536, 64, "bfloat16"),
    (1_000_000, 65_536, 128, "bfloat16"),
    (1_000_000, 20_000, 256, "bfloat16"),
    (262_144, 1024, 256, "float32"),
    (1_000_000, 1024, 8, "float32"),
    (65_536, 16_384, 8, "float32"),
    (256, 1024, 64, "float32"),
    (1, 65_536, 64, "float32"),
)
DRY_SHAPES = ((70, 40, 16, "bfloat16"), (33, 20, 8, "float32"))
STEPS = ((65_536, 1024, 64), (65_536, 8192, 256))  # N, K, D, float32
DRY_STEPS = ((50, 20, 8),)
RESIDUAL = (8, 6000, 128, 1024)  # stages, rows, D, K
REFERENCE_PAIRS = 1 << 18  # N K of the largest search that the reference repeats
NAIVE_BYTES = 16 << 30  # largest N x K matrix that the naive versions are asked to make
TESTS = ["tests/kernels/test_on_device.py"]
TESTS += [f"tests/kernels/test_triton_{name}.py" for name in ("search", "mutations", "code_sums", "ema_update")]
TESTS += [f"tests/kernels/test_triton_{name}.py" for name in ("vector_quantize", "residual_quantize")]

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

    def timed(self, call: Callable[[], Any]) -> Record:
        """Milliseconds of a call, or why there are none."""
        from fastvq.measure.device import median_milliseconds

        if time.monotonic() > self.end:
            return {"why": "out of time"}
        try:
            return {"ms": float(f"{median_milliseconds(call, self.device, calls=1 if self.dry else 7):.4g}")}
        except Exception as error:
            return {"why": f"{type(error).__name__}: {str(error)[:300]}"}


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


def environment(**more: str) -> dict[str, str]:
    """For processes of their own: the package, the tests' and the benchmarks' modules."""
    path = [str(STAGED), str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"} | more


def python(check: Check, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, in a folder where `ROOT/fastvq`, which lacks its kernels, is not found.

    When time is up it is interrupted, as by Ctrl-C, so that pytest tells what it has seen.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, cwd=STAGED, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=max(10.0, check.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                said, _ = process.communicate(timeout=20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, said)


def build(check: Check) -> str:
    """Build the extensions in place where there are compilers; without them the Triton kernels still run."""
    if check.dry:
        return "left as it is"
    major, minor = torch.cuda.get_device_capability()
    here = {"FASTVQ_CUDA_ARCHITECTURES": f"{major}{minor}" + "a" * (major == 9)} if torch.version.cuda else {}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | here, timeout=300
    )
    return "built" if done.returncode == 0 else f"not built: {done.stderr[-500:]}"


def run_tests(check: Check) -> Record:
    """The kernels' tests on the device, several processes at a time where pytest-xdist is installed."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "--tb=short", "--rootdir", str(ROOT)]
    if not check.dry and importlib.util.find_spec("xdist"):
        options += ["-n", str(min(12, os.cpu_count() or 1))]
    files = [str(ROOT / name) for name in (TESTS[:1] if check.dry else TESTS)]
    done = python(check, "-m", "pytest", *options, *files, FASTVQ_TEST_DEVICE=check.device.type)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    result = {"summary": summary, "failed": failures[:40]}
    if done.returncode:
        print(done.stdout[-8000:], flush=True)
        raise AssertionError(json.dumps(result))
    return result


SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 75.0  # of each, at most: they slow kernels down a hundredfold


def sanitize(check: Check) -> Record:
    """What compute-sanitizer's tools say of `sanitized_calls`, a process each; "absent" where it is not installed."""
    from fastvq.backends import cuda

    if not check.dry and cuda.missing():
        return dict.fromkeys(SANITIZER_TOOLS, f"not run: {cuda.missing()}")
    beside_nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(str(beside_nvcc))
    if sanitizer is None:
        return dict.fromkeys(SANITIZER_TOOLS, "absent")
    found: Record = {}
    for name in SANITIZER_TOOLS:
        command = [sanitizer, "--tool", name, "--error-exitcode", "86", sys.executable, "-m", "benchmarks.gpu_check"]
        left = min(SANITIZER_SECONDS, max(10.0, check.end - time.monotonic()))
        try:
            done = subprocess.run(
                [*command, "--sanitized", check.device.type],
                cwd=STAGED,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            found[name] = f"not finished in {left:.0f} s"
            continue
        if done.returncode:
            raise AssertionError(f"{name}, exit status {done.returncode}: {done.stdout[-4000:]}")
        found[name] = done.stdout.strip().splitlines()[-1]
    return found


def sanitized_calls(device: str) -> int:
    """A small call of each of the five operators, forward and backward; indices are compared with the reference's."""
    import fastvq

    backend = "cuda" if device == "cuda" else "reference"
    torch.manual_seed(0)
    for n, k, d, dtype in ((300, 200, 8, "float32"), (70, 130, 40, "float16"), (40, 70, 300, "float32")):
        x, codebook = (torch.randn(rows, d, device=device).to(getattr(torch, dtype)) for rows in (n, k))
        leaves = [x.requires_grad_(), codebook.requires_grad_()]
        options = {"codebook_weight": 1.0, "return_counts": True, "backend": backend}
        quantized, indices, loss, taken = fastvq.vector_quantize(x, codebook, **options)
        summed, stages, losses = fastvq.residual_quantize(x, torch.stack([codebook] * 2), backend=backend)
        torch.autograd.grad(quantized.float().sum() + loss + summed.float().sum() + losses.sum(), leaves)
        counts, sums = fastvq.code_sums(x.detach(), indices, k, backend=backend)
        if not torch.equal(taken.to(counts), counts):
            raise AssertionError(f"{n}, {k}, {d}, {dtype}: the counts of the search are not those of the sums")
        state = [torch.ones_like(sums), torch.ones_like(counts), torch.ones_like(sums)]
        fastvq.ema_update_(*state, counts, sums, decay=0.9, backend=backend)
        wanted = fastvq.search(x.detach().cpu(), codebook.detach().cpu(), backend="reference")
        for found in (indices, stages[..., 0], fastvq.search(x, codebook, backend=backend)):
            if not torch.equal(found.cpu(), wanted):
                raise AssertionError(f"{n}, {k}, {d}, {dtype}: an index is not the reference's")
    print(f"five operators on {device}: as the reference has it")
    return 0


# ---- fast ---------------------------------------------------------------------------------------------------------


def backends(check: Check) -> dict[str, Any]:
    """The modules that can compute on the device, other than the reference."""
    from fastvq.backends import cuda, triton

    return {"triton": triton} | ({} if check.dry or cuda.missing() else {"cuda": cuda})


def measure_limits(check: Check) -> Record:
    """The device's copy bandwidth in GB/s and matrix rate in GFLOP/s, float16 on a GPU."""
    from fastvq.measure.device import limits

    found = limits(check.device)
    return {"copy_gbs": found.copy, "matrix_gflops": max(found.rates.values()), "rates": found.rates}


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
        compiled = torch.compile(expanded, backend="eager" if check.dry else "inductor")
        yield "torch.compile of naive matmul", lambda: compiled(x, codebook)
        if importlib.util.find_spec("vector_quantize_pytorch"):
            from vector_quantize_pytorch import VectorQuantize

            layer = VectorQuantize(dim=x.shape[1], codebook_size=codebook.shape[0]).to(x.device).eval()
            layer._codebook.embed.data.copy_(codebook[None])
            rows = x.float()[None]
            yield "vector-quantize-pytorch", lambda: layer(rows)
    if importlib.util.find_spec("flash_kmeans"):  # in a dry run it refuses the CPU, which is recorded
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        squares = x.float().square().sum(-1)[None]
        rows, codes = x[None].contiguous(), codebook[None].contiguous()
        yield "flash-kmeans", lambda: euclid_assign_triton(rows, codes, squares)


def drawn(check: Check, n: int, k: int, d: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian rows and codes on the device."""
    return tuple(torch.randn(rows, d, device=check.device).to(getattr(torch, dtype)) for rows in (n, k))


def compare_indices(check: Check) -> Record:
    """How many shapes there are at which every backend finds the same codes, those of the reference where it is quick.

    Raises:
        AssertionError: an index differs.
    """
    from fastvq.backends import reference

    shapes = DRY_SHAPES if check.dry else SHAPES
    for n, k, d, dtype in shapes:
        x, codebook = drawn(check, n, k, d, dtype)
        engines = ({"reference": reference} if n * k <= REFERENCE_PAIRS else {}) | backends(check)
        found = {name: e.search(x, codebook, "euclidean", False, "exact")[0] for name, e in engines.items()}
        first, *others = found
        wrong = {name: int((found[name] != found[first]).sum()) for name in others}
        if any(wrong.values()):
            raise AssertionError(f"indices unlike those of {first} at {n} x {k} x {d}, {dtype}: {wrong}")
    return {"shapes": len(shapes)}


def time_search(check: Check, limits: Record) -> list[Record]:
    """Milliseconds of every contender at every shape, its rate, and its part of what the device can do."""
    found = []
    for n, k, d, dtype in DRY_SHAPES if check.dry else SHAPES:
        x, codebook = drawn(check, n, k, d, dtype)
        for name, call in contenders(check, x, codebook):
            with torch.no_grad():
                row: Record = {"N": n, "K": k, "D": d, "dtype": dtype, "contender": name} | check.timed(call)
            if "ms" in row:
                moved = (n + k) * d * x.element_size() + 8 * n  # read once, and the indices written
                figures = {"tflops": 2 * n * k * d / row["ms"] / 1e9}
                figures["of_matrix_rate"] = figures["tflops"] * 1000 / limits["matrix_gflops"]
                figures["of_bandwidth"] = moved / row["ms"] / 1e6 / limits["copy_gbs"]
                row |= {name: float(f"{value:.4g}") for name, value in figures.items()}
            found.append(row)
    return found


def training_step(layer: Any, x: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of a layer of `fastvq.measure.contenders`."""
    upstream = torch.full_like(x, 1e-3)

    def step() -> object:
        leaf = x.detach().requires_grad_()
        quantized, loss = layer(leaf)
        return torch.autograd.grad([quantized, loss], [leaf], [upstream, torch.ones_like(loss)])

    return step


def time_steps(check: Check) -> list[Record]:
    """A training step of the layer, forward, backward and EMA update: fastvq, its module, plain torch, the peer."""
    import fastvq
    from fastvq.measure.contenders import LAYERS, ModuleLayer, available
    from fastvq.measure.contenders import STEPS as NAMES

    found = []
    for n, k, d in DRY_STEPS if check.dry else STEPS:
        x, codebook = drawn(check, n, k, d, "float32")
        for name in available(NAMES):
            for served in backends(check) if name in ("fastvq", "module") else ("auto",):
                layer = LAYERS[name](codebook.cpu() if name in ("module", "peer") else codebook)
                if isinstance(layer, ModuleLayer):
                    layer.module.to(check.device)
                contender = name if served == "auto" else f"{name} {served}"
                with fastvq.use_backend(served):
                    took = check.timed(training_step(layer, x))
                found.append({"N": n, "K": k, "D": d, "contender": contender} | took)
    return found


def time_residual(check: Check) -> list[Record]:
    """All stages of a residual quantiser in evaluation."""
    import fastvq

    stages, n, d, k = (2, 40, 8, 20) if check.dry else RESIDUAL
    x, codes = drawn(check, n, stages * k, d, "float32")
    codebooks = codes.reshape(stages, k, d) * 0.9 ** torch.arange(stages, device=check.device).reshape(-1, 1, 1)
    rivals: dict[str, Callable[[], Any]] = {
        f"fastvq {name}": lambda name=name: fastvq.residual_quantize(x, codebooks, backend=name)
        for name in backends(check)
    }

    def plain() -> torch.Tensor:
        residual = x
        for codebook in codebooks:
            residual = residual - codebook[expanded(residual, codebook)]
        return x - residual

    rivals["naive matmul"] = plain
    if importlib.util.find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import ResidualVQ

        peer = ResidualVQ(dim=d, num_quantizers=stages, codebook_size=k).to(check.device).eval()
        rivals["vector-quantize-pytorch"] = lambda: peer(x[None])
    shape = {"Q": stages, "N": n, "K": k, "D": d}
    with torch.no_grad():
        return [shape | {"contender": name} | check.timed(call) for name, call in rivals.items()]


def time_kernels(check: Check) -> list[Record]:
    """Microseconds of each kernel of a search, and of a training step."""
    import fastvq
    from fastvq.measure.contenders import FusedLayer

    found = []
    for n, k, d, dtype in DRY_SHAPES if check.dry else SHAPES:
        x, codebook = drawn(check, n, k, d, dtype)
        for name, backend in backends(check).items():
            call = lambda backend=backend, x=x, codebook=codebook: backend.search(x, codebook, "euclidean", False, "")  # noqa: E731
            took = by_kernel(check, call)
            found.append({"N": n, "K": k, "D": d, "dtype": dtype, "of": f"search {name}", "us": took})
    for n, k, d in DRY_STEPS if check.dry else STEPS:
        x, codebook = drawn(check, n, k, d, "float32")
        for name in backends(check):
            with fastvq.use_backend(name):
                took = by_kernel(check, training_step(FusedLayer(codebook), x))
            found.append({"N": n, "K": k, "D": d, "dtype": "float32", "of": f"step {name}", "us": took})
    return found


def by_kernel(check: Check, call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds a call spends in each kernel, by the profiler; in a dry run in each of torch's operators."""
    from torch.profiler import ProfilerActivity, profile

    calls, activity = (1, ProfilerActivity.CPU) if check.dry else (3, ProfilerActivity.CUDA)
    wait = torch.cpu.synchronize if check.dry else torch.cuda.synchronize
    call()
    wait()
    with profile(activities=[activity]) as profiler:
        for _ in range(calls):
            call()
        wait()
    name = "self_cpu_time_total" if check.dry else "self_device_time_total"
    events = [(getattr(event, name), event.key[:80]) for event in profiler.key_averages()]
    return {key: round(took / calls, 1) for took, key in sorted(events, reverse=True) if took > 0}


def time_tiles(check: Check) -> list[Record]:
    """The screen with other tiles than the heuristics', fastest first: what FASTVQ_AUTOTUNE=1 would find."""
    from fastvq.kernels import search
    from fastvq.kernels.launch import device_of
    from fastvq.kernels.rows import rows_of

    found = []
    for n, k, d, dtype in DRY_SHAPES if check.dry else SHAPES:
        if time.monotonic() > check.end:
            break
        x, codebook = drawn(check, n, k, d, dtype)
        device, width, rows = device_of(x), search.width_of(d), rows_of(x, False)
        raw = search.operand_type(x, codebook)[1]
        choices = search.choices_for(device, k, width, raw)[: 2 if check.dry else None]
        run = lambda tiles: search.screen(device, rows, codebook, True, width, tiles, 1.0)  # noqa: E731, B023
        timed = {tiles: check.timed(lambda tiles=tiles: run(tiles)) for tiles in choices}  # noqa: B023
        times = {tiles: record["ms"] for tiles, record in timed.items() if "ms" in record}
        ranked = sorted(times, key=lambda tiles: times[tiles])
        found.append(
            {"N": n, "K": k, "D": d, "dtype": dtype, "usual": list(choices[0]), "usual_ms": times.get(choices[0])}
            | {"ms": {" ".join(map(str, tiles)): round(times[tiles], 4) for tiles in ranked}}
        )
    return found


# ---- compiled ahead, on all cores ---------------------------------------------------------------------------------

_work: list[Any] = []  # what the processes of the pool share by fork


def _compile_at(place: int) -> str:
    from benchmarks.ahead_of_time import compiled

    torch.set_num_threads(1)
    try:
        compiled(_work[place])
    except Exception as error:
        return f"{_work[place].kernel.__name__}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_ahead(check: Check) -> Record:
    """Fill Triton's cache with what the timings launch, by processes of their own that never touch the device."""
    dry = ["--dry"] if check.dry else []
    done = python(check, "-m", "benchmarks.gpu_check", "--compile", *dry, TRITON_INTERPRET="0")
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def arch_here() -> str:
    """The GPU's architecture without touching it; empty where nvidia-smi is missing or finds none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except FileNotFoundError:
        return ""
    return f"sm_{re.sub('[^0-9]', '', lines[0])}" if lines else ""


def compile_all(dry: bool) -> int:
    """What `compile_ahead` has done for it: the launches of `SHAPES` on the GPU that is here; dry, some for an H100."""
    from fastvq.kernels import launch, search
    from fastvq.kernels.rows import rows_of

    from benchmarks.ahead_of_time import launches_of, operator_calls

    arch, shapes = ("sm_90", DRY_SHAPES[:1]) if dry else (arch_here(), SHAPES)
    found: dict[Any, None] = {}
    for n, k, d, dtype in shapes if arch in launch.DEVICES else ():
        x, codebook = (torch.empty(rows, d, dtype=getattr(torch, dtype), device="meta") for rows in (n, k))
        calls = operator_calls(x, codebook, "euclidean", False)[:1]
        device, width = launch.DEVICES[arch], search.width_of(d)
        for tiles in search.choices_for(device, k, width, search.operand_type(x, codebook)[1])[: 2 if dry else None]:
            calls.append(
                lambda x=x, codebook=codebook, device=device, width=width, tiles=tiles: search.screen(
                    device, rows_of(x, False), codebook, True, width, tiles, 1.0
                )
            )
        for call in calls:
            found.update(dict.fromkeys(launches_of(arch, call)))
    _work.extend(found)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        errors = list(filter(None, pool.map(_compile_at, range(len(_work)), chunksize=1)))
    print(json.dumps({"launches": len(_work), "errors": errors[:10]}))
    return 0


# ---- written down -------------------------------------------------------------------------------------------------


def table(rows: list[Record], columns: tuple[str, ...]) -> list[str]:
    """Records as a Markdown table; what could not be measured says why."""
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(str(row.get(name, row.get('why', '-'))) for name in columns)} |")
    return lines


def markdown(report: Record) -> str:
    """The report as a page."""
    about = report["machine"]
    lines = [f"# {about['device']}", "", f"{json.dumps(about['versions'])}{', a dry run' if about['dry'] else ''}", ""]
    lines += ["| step | | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {step['status']} | {step.get('seconds', '')} |" for name, step in report["steps"].items()]
    results = {name: step.get("result") for name, step in report["steps"].items()}
    if results.get("tests"):
        lines += ["", f"Tests on the device: {results['tests']['summary'].strip('= ')}"]
    if results.get("sanitizer"):
        lines += ["", "; ".join(f"{name}: {said}" for name, said in results["sanitizer"].items())]
    if results.get("limits"):
        limits = results["limits"]
        lines += [
            "",
            f"Limits measured: copy {limits['copy_gbs']:.0f} GB/s, {limits['matrix_gflops'] / 1e3:.0f} TFLOP/s",
        ]
    shape = ("N", "K", "D", "dtype", "contender", "ms")
    lines += ["", "## Search"]
    lines += table(results.get("search") or [], (*shape, "tflops", "of_matrix_rate", "of_bandwidth"))
    lines += ["", "## Training step: forward, backward, EMA update"]
    lines += table(results.get("training step") or [], ("N", "K", "D", "contender", "ms"))
    lines += ["", "## Residual quantiser, evaluation"]
    lines += table(results.get("residual quantiser") or [], ("Q", "N", "K", "D", "contender", "ms"))
    lines += ["", "## Microseconds of each kernel"]
    for row in results.get("kernels") or []:
        parts = ", ".join(f"{name} {took}" for name, took in row["us"].items())
        lines.append(f"- {row['of']}, {row['N']}, {row['K']}, {row['D']}, {row['dtype']}: {parts}")
    lines += ["", "## Tiles of the screen (rows, columns, steps, warps, stages), fastest first"]
    for row in results.get("tiles") or []:
        best = ", ".join(f"{tiles}: {took} ms" for tiles, took in list(row["ms"].items())[:5])
        usual = f"usual {' '.join(map(str, row['usual']))}: {row['usual_ms']:.4g} ms" if row["usual_ms"] else "usual: -"
        lines.append(f"- {row['N']}, {row['K']}, {row['D']}, {row['dtype']}: {usual}; {best}")
    return "\n".join(lines) + "\n"


def prepare(dry: bool) -> None:
    """Make the package importable whether it is installed or not, and the tests' modules; the interpreter for --dry."""
    staged = STAGED / "fastvq"
    staged.mkdir(parents=True, exist_ok=True)
    for entry in [*(ROOT / "fastvq").iterdir(), ROOT / "kernels"]:
        if not (staged / entry.name).exists():
            (staged / entry.name).symlink_to(entry)
    sys.path[:0] = [str(STAGED), str(ROOT / "tests")]
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.cure()


def main() -> int:
    """Run all steps, write the files, and return 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and Markdown files")
    parser.add_argument("--seconds", type=float, default=540.0, help="no further step or timing begins after that")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps and no others")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", choices=["cpu", "cuda"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        return compile_all(options.dry)
    if options.sanitized:
        return sanitized_calls(options.sanitized)
    if not options.dry and not torch.cuda.is_available():
        print("no GPU that torch can use; --dry runs the same on the CPU", file=sys.stderr)
        return 2
    check = Check(options.dry, options.seconds)
    steps: dict[str, Callable[[], Any]] = {
        "compile ahead": lambda: compile_ahead(check),
        "limits": lambda: measure_limits(check),
        "indices": lambda: compare_indices(check),
        "search": lambda: time_search(check, check.steps["limits"]["result"]),
        "training step": lambda: time_steps(check),
        "residual quantiser": lambda: time_residual(check),
        "kernels": lambda: time_kernels(check),
        "tiles": lambda: time_tiles(check),
        "sanitizer": lambda: sanitize(check),
        "tests": lambda: run_tests(check),  # last: they take what time is left
    }
    unknown = set(options.only or ()) - {"build", *steps}
    if unknown:
        parser.error(f"--only: no step {sorted(unknown)}; there are build, {', '.join(steps)}")
    if options.only is None or "build" in options.only:
        check.step("build", lambda: build(check))
    prepare(options.dry)
    about = machine(check)
    for name, work in steps.items():
        if options.only is None or name in options.only:
            check.step(name, work)
    report = {"machine": about, "steps": check.steps}
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
