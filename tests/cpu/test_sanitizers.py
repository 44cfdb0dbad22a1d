"""The C++ under AddressSanitizer, UBSan and ThreadSanitizer, with its bound cut down, and on Arm: a driver runs it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("fastvq_setup", ROOT / "setup.py")
assert spec is not None
assert spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

VARIANTS = {
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "plain": ["-O1"],
    "shrunk": ["-O1", "-DFASTVQ_BOUND_FACTOR=0.25"],
}

INT8_FORMS = ("transformed", "long rows", "no bias", "dot")
INT8_BOUNDS = ("int8 bound", *(f"int8 bound, {form}" for form in INT8_FORMS))


def build_driver(folder: Path, flags: list[str]) -> Path:
    """The driver and csrc/cpu in one program, with extra compiler flags."""
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).parent / "driver.cpp"]
    return build.link_cpu(folder, folder / "driver", sources, flags, ["-pthread", "-ldl", *flags])


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build_driver(tmp_path_factory.mktemp(name), flags) for name, flags in VARIANTS.items()}


def run(driver: Path, *arguments: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}
    if isa is not None:
        environment["FASTVQ_CPU_ISA"] = isa
    return subprocess.run([str(driver), *arguments], capture_output=True, text=True, env=environment, check=False)


def instruction_sets() -> list[str]:
    from fastvq.backends import cpu

    return cpu.extension().instruction_sets()


@pytest.mark.parametrize("variant", ["address", "thread"])
def test_random_cases_under_sanitizers(drivers: dict[str, Path], variant: str) -> None:
    for seed, isa in enumerate(instruction_sets()):
        result = run(drivers[variant], "random", str(seed), "60", isa=isa)
        assert result.returncode == 0, result.stdout + result.stderr
        assert isa in result.stdout


def test_the_sanitizer_would_see_a_fault(tmp_path: Path) -> None:
    source = tmp_path / "fault.cpp"
    source.write_text("#include <vector>\nint main(int n, char**) { std::vector<float> v(n); return int(v[n + 1]); }\n")
    compiler = build.cpu_compiler().split()
    program = tmp_path / "fault"
    subprocess.run([*compiler, *VARIANTS["address"], str(source), "-o", str(program)], check=True)
    assert "heap-buffer-overflow" in run(program).stderr


def test_the_whole_bound_is_enough_and_a_quarter_is_not(drivers: dict[str, Path]) -> None:
    for isa in instruction_sets():
        whole = run(drivers["plain"], "bound", isa=isa)
        assert whole.returncode == 0, whole.stdout
        shrunk = run(drivers["shrunk"], "bound", isa=isa)
        assert shrunk.returncode == 1, shrunk.stdout
        assert "FAILED: bound, D 64, row 0: index 0, want 16" in shrunk.stdout
        assert "FAILED: few rows, D 512, row 0: index 3, want 16" in shrunk.stdout
        if "vnni" in isa:  # the bound of the int8 screen by itself
            for case in INT8_BOUNDS:
                assert f"FAILED: {case}, row 0: index 0, want 16" in shrunk.stdout


def test_avx_vnni_in_the_encoding_of_avx512(tmp_path: Path) -> None:
    """The kernel for machines without AVX-512, on one with it: the same instructions, otherwise encoded."""
    if "avx512vnni" not in instruction_sets():
        pytest.skip("needs AVX-512 VNNI")
    whole, shrunk = tmp_path / "whole", tmp_path / "shrunk"
    driver = build_driver(whole, ["-DFASTVQ_EVEX", *VARIANTS["address"]])
    for arguments in (["bound"], ["random", "6", "60"]):
        result = run(driver, *arguments, isa="avxvnni")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "avxvnni: 0 failures" in result.stdout
    result = run(build_driver(shrunk, ["-DFASTVQ_EVEX", *VARIANTS["shrunk"]]), "bound", isa="avxvnni")
    for case in INT8_BOUNDS:
        assert f"FAILED: {case}, row 0: index 0, want 16" in result.stdout


ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_arm_in_an_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", ARM_COMPILER)
    driver = build_driver(tmp_path, ["-O1", "-static"])
    for arguments in (["bound"], ["random", "5", "20"]):
        result = subprocess.run([ARM_EMULATOR, str(driver), *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "portable: 0 failures" in result.stdout
