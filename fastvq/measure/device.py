"""A device's clock, memory and limits: the same questions to a CPU and to a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastvq.measure import memory
from fastvq.measure.contenders import UNITS, peak_operations, peak_work
from fastvq.measure.worker import RETURN_MEMORY, Worker

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far more than any cache holds
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes: by events of the stream on a GPU, so that starting it is not counted."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    before = time.perf_counter()
    call()
    return (time.perf_counter() - before) * 1e3


def median_milliseconds(call: Callable[[], object], device: torch.device, calls: int = 7) -> float:
    """The median of some calls after two to warm up."""
    for _ in range(2):
        call()
    return statistics.median(milliseconds(call, device) for _ in range(calls))


@dataclass(frozen=True)
class Limits:
    """What the device was measured to do at most.

    Attributes:
        copy: GB/s, bytes read and bytes written by a large copy.
        rates: G operations/s of the arithmetic that kernels are made of, by its name; the exact arithmetic, float32,
            comes first, what is screened with after it.
    """

    copy: float
    rates: dict[str, float]


def limits(device: torch.device) -> Limits:
    """Measure them: a copy; and loops in registers on a CPU, large matrix products on a GPU."""
    copy = _copy_rate(device)
    if device.type == "cpu" and peak_operations("float32", 1):
        threads = torch.get_num_threads()
        loops = [unit for unit in UNITS if peak_operations(unit, 1)]
        took = {unit: median_milliseconds(peak_work(unit).call, device) for unit in loops}
        return Limits(copy, {unit: peak_operations(unit, threads) / took[unit] / 1e6 for unit in loops})
    kinds = {"float32": torch.float32} | ({"float16": torch.float16} if device.type == "cuda" else {})
    return Limits(copy, {name: _matmul_rate(dtype, device) for name, dtype in kinds.items()})


def _copy_rate(device: torch.device) -> float:
    """GB/s, bytes read and bytes written."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_milliseconds(lambda: target.copy_(source), device) / 1e6


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """G operations/s of a product of square matrices; float32 is float32, never TF32."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        took = median_milliseconds(lambda: a @ b, device)
    finally:
        torch.set_float32_matmul_precision(precision)
    return 2 * side**3 / took / 1e6


class MemoryMeter:
    """Peak memory of calls, beyond what was there before them, results included. Use it in a `with`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # On a CPU in a process of its own, where freed memory goes back to the system at once.
        self._worker = Worker(RETURN_MEMORY) if device.type == "cpu" and memory.measurable() else None

    def __enter__(self) -> MemoryMeter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            self._worker.__exit__(*error)

    def peak_mib(self, make: Callable[..., Callable[[], object]], *arguments: object) -> float | None:
        """MiB of the call that `make`, a function of a module, returns for the arguments; None where nobody tells."""
        if self._device.type == "cuda":
            call = make(*arguments)
            torch.cuda.synchronize(self._device)
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            result = call()
            torch.cuda.synchronize(self._device)
            del result
            return (torch.cuda.max_memory_allocated(self._device) - before) / 2**20
        return None if self._worker is None else self._worker.call(_peak_here, make, arguments)


def _peak_here(make: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> float:
    return memory.peak_mib(make(*arguments))
