"""Shapes, strides, dtypes and values as hypothesis likes, for every operator of the C++ under sanitizers."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import environment, instruction_sets

SETTINGS = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}


class Fuzz:
    """The program, kept running, in one instruction set; started again after a fault."""

    def __init__(self, program: Path, isa: str) -> None:
        self.program, self.isa = program, isa
        self.process: subprocess.Popen[str] | None = None

    def answer(self, case: str) -> str:
        """What it says of a case; when it dies of it, what the sanitizer says."""
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.process = subprocess.Popen([self.program], text=True, env=environment(self.isa), **pipes)
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        return answer or self.stop()

    def stop(self) -> str:
        """End it; what it has written as errors, leaks among them."""
        if self.process is None:
            return ""
        process, self.process = self.process, None
        return process.communicate()[1]


@pytest.fixture(scope="module")
def fuzz(program) -> Iterator[Callable[[str, str], Fuzz]]:
    """fuzz(variant, isa); whatever sanitizers find at the end is an error too."""
    running: dict[tuple[str, str], Fuzz] = {}

    def start(variant: str, isa: str) -> Fuzz:
        if (variant, isa) not in running:
            running[variant, isa] = Fuzz(program(variant, "fuzz"), isa)
        return running[variant, isa]

    yield start
    said = "".join(each.stop() for each in running.values())
    assert not said, said


def numbers(*values: Any) -> str:
    """A list as the program reads it: how many, then each."""
    return " ".join(map(str, [len(values), *values]))


@st.composite
def layouts(draw: st.DrawFn, dims: int, expandable: int) -> str:
    """An order of the dimensions in memory, gaps, an offset, and perhaps one of the first repeated with stride 0."""
    order = draw(st.permutations(range(dims - 1, -1, -1)))
    gaps = draw(st.lists(st.sampled_from([0, 0, 0, 1, 3]), min_size=dims, max_size=dims))
    expanded = draw(st.sampled_from([-1] * 4 + list(range(expandable))))
    return f"{numbers(*order)} {numbers(*gaps)} {draw(st.integers(0, 3))} {expanded}"


SIZES = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 33, 65]))
CODES = st.one_of(st.integers(1, 18), st.sampled_from([31, 32, 64, 65, 100, 257]))
WIDTHS = st.one_of(st.integers(1, 18), st.sampled_from([31, 32, 63, 65]))
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 1e30, -1e30, 3.4e38, 6e4, 1e-300, 1e300]
POOLS = st.one_of(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 1.0 + 2**-23, 10.0]), min_size=1, max_size=6),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.lists(st.one_of(st.floats(-3, 3), st.sampled_from(SPECIAL)), min_size=1, max_size=12),
)


@st.composite
def cases(draw: st.DrawFn) -> str:
    """A case, as a line of tests/cpu/fuzz.cpp."""
    heads = draw(st.sampled_from([0, 0, 0, 1, 3]))
    lead = draw(st.lists(SIZES if heads == 0 else st.integers(0, 9), max_size=3))
    while len(lead) > 1 and lead[0] * lead[1] > 100:  # few rows, so that many cases are tried
        lead.pop()
    dims = (heads > 0) + len(lead) + 1
    flags = draw(st.tuples(*[st.integers(0, 1)] * 4))  # dot product, certified, masked, noise on the values
    stages, codes, width = draw(st.integers(1, 3)), draw(CODES), draw(WIDTHS)
    dtypes = draw(st.sampled_from([(0, 0), (0, 0), (1, 1), (2, 2), (3, 3), (1, 0), (2, 3), (0, 1)]))
    parts = [draw(st.integers(0, 2**32)), draw(st.integers(1, 4)), *flags, heads, stages, codes, width, *dtypes]
    pool = ["nan" if math.isnan(value) else value.hex() for value in draw(POOLS)]
    layout_of_codes = draw(layouts((heads > 0) + 3, (heads > 0) + 2))
    return (
        f"{' '.join(map(str, parts))} {numbers(*lead)} {draw(layouts(dims, dims))} {layout_of_codes} {numbers(*pool)}"
    )


@settings(max_examples=100, derandomize=True, **SETTINGS)
@given(case=cases())
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_any_case_on_every_instruction_set(variant: str, fuzz, case: str) -> None:
    for isa in instruction_sets():
        assert fuzz(variant, isa).answer(case) == "ok", f"{variant}, {isa}: {case}"


@pytest.mark.soak
@settings(max_examples=20_000, **SETTINGS)
@given(case=cases())
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_any_of_many_cases_on_every_instruction_set(variant: str, fuzz, case: str) -> None:
    for isa in instruction_sets():
        assert fuzz(variant, isa).answer(case) == "ok", f"{variant}, {isa}: {case}"
