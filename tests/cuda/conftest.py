"""What the tests of the CUDA backend share: programs and a module compiled against the shim, once a session."""

from pathlib import Path

import pytest
from shimmed import SANITIZERS, compile_shim


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    """The program of faults.cu: as all tests run it, and under AddressSanitizer and UBSan."""
    source = Path(__file__).parent / "faults.cu"
    programs = {}
    for name, flags in {"plain": [], "sanitized": SANITIZERS}.items():
        folder = tmp_path_factory.mktemp(name)
        programs[name] = compile_shim(folder, folder / "faults", [source], flags)
    return programs
