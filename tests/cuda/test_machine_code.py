"""What nvcc made, where it built: nothing spills, on any architecture; 16 bytes move at a time; no call waits."""

import importlib.util
import re
import subprocess

import pytest

from benchmarks.ahead_of_time import tool
from benchmarks.cuda_report import ARCHES, usage

SPEC = importlib.util.find_spec("fastvq._cuda")

pytestmark = pytest.mark.skipif(SPEC is None, reason="fastvq was built without nvcc")


def test_no_kernel_spills_or_keeps_arrays_in_local_memory():
    kernels = usage(SPEC.origin)
    by_arch = {}
    for (arch, name), used in kernels.items():
        by_arch.setdefault(arch, {})[name] = used
    assert set(by_arch) <= set(ARCHES)
    assert all(len(names) > 100 for names in by_arch.values()), {arch: len(names) for arch, names in by_arch.items()}
    assert all(any("DeviceRadixSort" in name for name in names) for names in by_arch.values())
    assert [(arch, name, used) for (arch, name), used in kernels.items() if used.stack or used.local] == []


def test_rows_codes_and_results_move_16_bytes_at_a_time():
    """Loads and stores of the kernels for rows in vectors: (x, code, gradient) in, one vector out."""
    kernels = usage(SPEC.origin)
    arch = sorted({arch for arch, _ in kernels})[-1]
    wanted = {r"gather_kernelIffLi4E": (2, 1), r"pull_kernelI6__halfS\w_Li8E": (3, 1), r"sum_rows_kernelIfLi4E": (4, 0)}
    names = {kind: next(n for a, n in kernels if a == arch and re.search(kind, n)) for kind in wanted}
    command = [tool("cuobjdump"), "-sass", "-fun", ",".join(names.values()), SPEC.origin]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = {part.split()[0]: part for part in code.split("Function : ")[1:]}
    for kind, (loads, stores) in wanted.items():
        assert parts[names[kind]].count("LDG.E.128") >= loads, kind
        assert parts[names[kind]].count("STG.E.128") >= stores, kind


def test_no_call_allocates_copies_or_waits():
    """So that a CUDA graph can capture it: what host code, ours and CUB's, calls of the runtime that is linked in."""
    command = ["objdump", "-d", "--no-show-raw-insn", SPEC.origin]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    called = set()
    for function in re.split(r"\n(?=[0-9a-f]+ <)", code):
        if re.match(r"[0-9a-f]+ <_Z\w*(fastvq|cub)", function):
            called |= set(re.findall(r"(?:call|jmp)\w* .*<(cuda[A-Z]\w*)>", function))
    assert called >= {"cudaLaunchKernelExC", "cudaMemsetAsync", "cudaFuncSetAttribute"}
    queries = r"cuda(Get|Peek|DeviceGet|FuncGet|Occupancy)\w*|cuda(SetDevice|FuncSetAttribute)"
    assert [name for name in called if not re.fullmatch(rf"{queries}|cudaLaunchKernel\w*|cudaMemsetAsync", name)] == []
