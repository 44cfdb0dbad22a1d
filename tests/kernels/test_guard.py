"""Guard pages end a test that touches memory out of bounds, on either side, and name the line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from compare import assert_same_bits
from guard import GuardedAllocations, guarded


@triton.jit
def copy_kernel(x, out, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + SHIFT, mask=at < n), mask=at < n)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1),
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1].expand(5, 7),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[0, 0],
}


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_guarded_tensor_is_the_same_tensor(dtype, side):
    for layout in LAYOUTS.values():
        t = layout(torch.arange(35).reshape(5, 7).to(dtype))
        copy = guarded(t, side)
        assert copy.stride() == t.stride()
        assert_same_bits(copy.double(), t.double())


def test_between_the_strides_lies_poison():
    t = torch.arange(10.0)[::3]
    assert guarded(t).as_strided((10,), (1,)).isnan().sum() == 6


@pytest.mark.parametrize("side", ["start", "end"])
def test_a_kernel_within_bounds_passes(side):
    x = guarded(torch.randn(1001), side)
    out = guarded(torch.empty(1001), side)
    copy_kernel[(triton.cdiv(1001, 256),)](x, out, 1001, SHIFT=0, BLOCK=256)
    assert_same_bits(out, x)


@pytest.mark.parametrize(("side", "shift"), [("end", 1), ("start", -1)])
def test_one_element_out_of_bounds_is_fatal(side, shift):
    program = f"""
import test_guard, torch
x = test_guard.guarded(torch.randn(1001), {side!r})
test_guard.copy_kernel[(4,)](x, torch.empty(1001), 1001, SHIFT={shift}, BLOCK=256)
"""
    here = Path(__file__).parent
    path = os.pathsep.join(str(folder) for folder in (here, here.parent))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr
    assert "in copy_kernel" in done.stderr


def test_what_torch_allocates_lies_between_guards_and_is_poisoned():
    x = torch.randn(6, 5)
    with GuardedAllocations() as allocations:
        empty, whole = torch.empty(3, 5), torch.empty(4, dtype=torch.int32)
        zeros, values, order = torch.zeros(7), *x.sort(dim=0)
        view = x[1:]
    assert empty.isnan().all()
    assert (whole == torch.iinfo(torch.int32).max).all()
    assert (zeros == 0).all()
    assert_same_bits(values, x.gather(0, order))
    assert view.data_ptr() == x[1:].data_ptr()
    assert allocations.made == 5
    for t in (empty, whole, zeros, values, order):
        assert (t.data_ptr() + t.numel() * t.element_size()) % 4096 == 0
