"""Launches: every one can be taken, and then nothing runs."""

import contextlib

import torch
import triton
import triton.language as tl
from fastvq.kernels import launch


@triton.jit
def _fill_kernel(out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 1.0, mask=at < n)


def test_a_launch_runs_unless_it_is_taken():
    out, taken = torch.zeros(5), []
    with launch.taken_by(lambda *arguments, **options: taken.append((arguments, options)), launch.DEVICES["sm_90"]):
        assert launch.device_of(torch.empty(1, device="meta")).arch == "sm_90"
        launch.launch(_fill_kernel, (1,), out, 5, BLOCK=8, num_warps=4)
    assert taken == [((_fill_kernel, (1,), out, 5), {"BLOCK": 8, "num_warps": 4, "enable_fp_fusion": False})]
    assert (out == 0).all()
    assert launch.device_of(out) is launch.INTERPRETER
    launch.launch(_fill_kernel, (1,), out, 5, BLOCK=8)
    assert (out == 1).all()


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: seen.append(t) or contextlib.nullcontext())
    out = torch.zeros(5)
    launch.launch(_fill_kernel, (1,), out, 5, BLOCK=8)
    assert seen[0] is out
