"""What nvcc made of the kernels, where it built them: no local memory, so no spills, for any architecture."""

import importlib.util

import pytest

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
    assert [(arch, name, used) for (arch, name), used in kernels.items() if used.stack or used.local] == []
