"""Programs of the C++ under test: tests/cpu/NAME.cpp and csrc/cpu in one, plain or under a sanitizer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("fastvq_setup", ROOT / "setup.py")
assert spec is not None
assert spec.loader is not None
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

VARIANTS = {
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "plain": ["-O1"],
    "shrunk": ["-O1", "-DFASTVQ_BOUND_FACTOR=0.25"],
}


def build(variant: str, name: str, folder: Path) -> Path:
    """The program `name` in a variant; those in one folder share the objects of csrc/cpu."""
    flags = VARIANTS[variant]
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), Path(__file__).parent / f"{name}.cpp"]
    return setup.link_cpu(folder, folder / name, sources, flags, ["-pthread", "-ldl", *flags])


def environment(isa: str | None = None) -> dict[str, str]:
    """For a program: sanitizers that stop at the first fault, and the instruction set."""
    chosen = {} if isa is None else {"FASTVQ_CPU_ISA": isa}
    return {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1", **chosen}


def run(program: Path, *arguments: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    """What a program says."""
    command = [str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(isa), check=False)


def instruction_sets() -> list[str]:
    """Those that were compiled and that this machine has."""
    from fastvq.backends import cpu

    return cpu.extension().instruction_sets()
