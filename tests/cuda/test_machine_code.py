"""What nvcc made of the kernels, where it built them: no local memory, so no spills, for any architecture."""

import importlib.util
import re
import subprocess

import pytest

from benchmarks.ahead_of_time import tool

SPEC = importlib.util.find_spec("fastvq._cuda")

pytestmark = pytest.mark.skipif(SPEC is None, reason="fastvq was built without nvcc")


def usage():
    """(architecture, kernel, registers, bytes of stack, bytes of local memory) of every kernel in the extension."""
    done = subprocess.run([tool("cuobjdump"), "-res-usage", SPEC.origin], capture_output=True, text=True, check=True)
    arch, name, found = None, None, []
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found.append((arch, name, *map(int, match.groups())))
    return found


def known(name):
    """Bytes of stack to be got rid of: some screens of the search keep a few registers there on sm_80 or sm_120."""
    return 16 if "ScreenPolicy" in name else 0


def test_no_kernel_spills_or_keeps_arrays_in_local_memory():
    kernels = usage()
    by_arch = {}
    for arch, name, *_ in kernels:
        by_arch.setdefault(arch, set()).add(name)
    assert all(len(names) > 100 for names in by_arch.values()), {arch: len(names) for arch, names in by_arch.items()}
    offenders = [(arch, name, stack, local) for arch, name, _, stack, local in kernels if stack > known(name) or local]
    assert offenders == []
