"""What the suites share: each contender by itself, timed by pytest-benchmark; `fastvq bench` has them take turns."""

import time

import pytest

from fastvq.measure.contenders import available
from fastvq.measure.table import machine


def every(contenders, shapes):
    """Every contender that can run here on every shape."""
    return [
        pytest.mark.parametrize("contender", available(contenders)),
        pytest.mark.parametrize("shape", shapes, ids=lambda shape: "x".join(map(str, shape))),
    ]


def measure(benchmark, group, work):
    """Rounds for some second, three at least, after one to warm up."""
    start = time.perf_counter()
    work.call()
    took = time.perf_counter() - start
    benchmark.group = group
    benchmark.extra_info |= machine()
    rounds = max(3, min(200, round(1 / took)))
    benchmark.pedantic(work.call, setup=work.before, rounds=rounds, warmup_rounds=1)
