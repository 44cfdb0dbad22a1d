"""The C++ under sanitizers, and with its bound cut down: searches in C++ that are built to go wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from programs import VARIANTS, instruction_sets, run, setup


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_more_codes_than_are_screened_at_once(program, variant: str) -> None:
    for isa in instruction_sets():
        result = run(program(variant, "driver"), "chunks", isa=isa)
        assert result.returncode == 0, result.stdout + result.stderr
        assert isa in result.stdout


def test_the_sanitizer_would_see_a_fault(tmp_path: Path) -> None:
    source = tmp_path / "fault.cpp"
    source.write_text("#include <vector>\nint main(int n, char**) { std::vector<float> v(n); return int(v[n + 1]); }\n")
    compiler = setup.cpu_compiler().split()
    program = tmp_path / "fault"
    subprocess.run([*compiler, *VARIANTS["address"], str(source), "-o", str(program)], check=True)
    assert "heap-buffer-overflow" in run(program).stderr


def test_the_whole_bound_is_enough_and_a_quarter_is_not(program) -> None:
    for isa in instruction_sets():
        whole = run(program("plain", "driver"), "bound", isa=isa)
        assert whole.returncode == 0, whole.stdout
        shrunk = run(program("shrunk", "driver"), "bound", isa=isa)
        assert shrunk.returncode == 1, shrunk.stdout
        assert "FAILED: bound, D 64, row 0: index 0, want 16" in shrunk.stdout
        if "vnni" in isa:  # the bound of the int8 screen by itself
            assert "FAILED: int8 bound, row 0: index 0, want 16" in shrunk.stdout
