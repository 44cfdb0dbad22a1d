"""What the operators launch: on meta tensors, where a call that waited for the device would be an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from fastvq.kernels import launch
from guard import on_device

import fastvq
from fastvq.backends import triton

ROOT = Path(__file__).parents[2]

SORT = ["key_kernel", "starts_kernel"]


def launched(call):
    """The names of the kernels that a call starts."""
    names = []
    with launch.taken_by(lambda kernel, *rest, **options: names.append(kernel.fn.__name__), launch.DEVICES["sm_90"]):
        call()
    return names


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("n", "levels"), [(0, 1), (256, 1), (257, 2), (65_537, 3), (16_777_217, 4)])
def test_no_operator_waits_for_the_device(n, levels):
    x, codebook, codebooks, mask = empty(n, 48), empty(1000, 48), empty(2, 1000, 48), empty(n, dtype=torch.bool)
    indices, loss = empty(n, dtype=torch.int64), empty()
    more = ["sum_chunks_kernel"] * (levels - 1)
    assert launched(lambda: triton.code_sums(x, indices, 1000, mask, False)) == [*SORT, "sum_rows_kernel", *more]
    tensors = codebook, empty(1000), codebook, empty(1000), codebook
    assert launched(lambda: triton.ema_update_(*tensors, 0.9, 1e-5)) == ["update_kernel"]
    gradient = ["sum_differences_kernel", *more]
    arguments = x, loss, x, codebook, indices, mask, 0.25, 1.0, True, True
    assert launched(lambda: triton.vector_quantize_backward(*arguments)) == ["pull_kernel", *SORT, *gradient]
    stages = empty(n, 2, dtype=torch.int64)
    arguments = x, empty(2), x, codebooks, stages, True, True
    found = launched(lambda: triton.residual_quantize_backward(*arguments))
    assert found == ["pull_stages_kernel", *SORT, *gradient, *gradient]
    search = ["frame_kernel", "pack_codes_kernel", "screen_kernel", "rescore_kernel", "whole_kernel"] if n else []
    forward = launched(lambda: triton.vector_quantize(x, codebook, "euclidean", 0.25, 1.0, mask))
    assert forward == [*search, "gather_kernel", "loss_kernel"]
    assert launched(lambda: triton.vector_quantize_counted(x, codebook, "euclidean", 0.25, 1.0, mask)) == forward
    forward = launched(lambda: triton.residual_quantize(x, codebooks, "euclidean"))
    search = ["frame_kernel", "pack_codes_kernel", "stages_kernel", "whole_kernel", "gather_stages_kernel"] if n else []
    assert forward == [*search, "loss_kernel"]
    launched(lambda: triton.residual_quantize(empty(n, 300), empty(2, 1000, 300), "euclidean"))


@pytest.mark.parametrize(("k", "kernels"), [(4096, ["update_kernel"]), (4097, ["total_kernel", "update_kernel"])])
def test_an_update_is_one_kernel_until_the_total_would_take_as_long(k, kernels):
    tensors = empty(2, k, 48), empty(2, k), empty(2, k, 48), empty(2, k), empty(2, k, 48)
    assert launched(lambda: triton.ema_update_(*tensors, 0.9, 1e-5)) == kernels


def test_nothing_is_compiled_at_import(tmp_path):
    """Triton's cache stays empty when every module is imported."""
    modules = [f"fastvq.kernels.{path.stem}" for path in (ROOT / "kernels").glob("[a-z]*.py")]
    program = f"import {', '.join(modules)}"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []


def test_torch_compile_takes_a_step_whole():
    """Forward, gradients, sums and update in one graph without a break: what an eager run computes."""

    def step(x, codebook, size, average):
        quantized, indices, loss = fastvq.vector_quantize(x, codebook.clone())
        counts, sums = fastvq.code_sums(x.detach(), indices, len(size))
        fastvq.ema_update_(codebook, size, average, counts, sums, decay=0.9)
        return quantized, indices, loss

    x, codebook = torch.randn(33, 5), torch.randn(9, 5)
    results = []
    with fastvq.use_backend("triton"):
        for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            state = on_device(codebook.clone(), torch.ones(9), codebook.clone())
            leaf = on_device(x.clone())[0].requires_grad_()
            quantized, indices, loss = call(leaf, *state)
            (gradient,) = torch.autograd.grad(quantized.square().sum() + loss, leaf)
            results.append((quantized, indices, loss, gradient, *state))
    for mine, right in zip(*results, strict=True):
        assert_same_bits(mine.detach(), right.detach())
