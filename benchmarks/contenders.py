"""What the suites share: every shape against every contender, timed by pytest-benchmark, peak memory beside it."""

import time

import pytest

from fastvq.cli import bench

EVERY = [
    pytest.mark.parametrize("contender", bench.available()),
    pytest.mark.parametrize("shape", bench.SHAPES, ids=lambda shape: "x".join(map(str, shape))),
]


def measure(benchmark, operation, contender, shape):
    """Rounds for some two seconds, three at least, after one to warm up; peak memory in a process of its own."""
    call = bench.work(operation, contender, shape)
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    benchmark.group = f"{operation} {shape}"
    benchmark.extra_info |= bench.machine() | {"peak_mib": bench.peak_mib(operation, contender, shape)}
    benchmark.pedantic(call, rounds=max(3, min(200, round(2 / took))), warmup_rounds=1)
