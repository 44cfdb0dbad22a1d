"""Offsets past 2^31 elements: rows and codes far apart in memory that is reserved but for their own pages."""

import mmap

import pytest
import torch
from compare import assert_same_bits, assert_same_indices
from guard import DEVICE

from fastvq.backends import reference, triton

FAR = (1 << 30) + 24  # the stride is an int32 yet, its double is not
NO_RESERVE = 0x4000  # mmap.MAP_NORESERVE, which Python has no name for before 3.13

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU has no memory to reserve; test_on_device.py has the case"
)


def far(t, dim=0):
    """A copy of `t` whose neighbours along `dim` lie FAR elements apart, and side by side along the others."""
    strides = list(torch.empty(t.select(dim, 0).shape).stride())
    strides.insert(dim, FAR)
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    pages = mmap.mmap(-1, span * t.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    memory = torch.frombuffer(pages, dtype=torch.uint8).view(t.dtype)
    return memory.as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("d", [5, 200])
def test_rows_and_their_gradients(d, dim):
    x, upstream, codebook = (torch.randn(n, d).bfloat16() for n in (4, 4, 6))
    if dim == 1:  # the dimensions far apart: three of them
        x, upstream, codebook = x[:, :3], upstream[:, :3], codebook[:, :3]
    wanted = reference.vector_quantize(x, codebook, "euclidean", 0.25, 0.7, None)
    found = triton.vector_quantize(far(x, dim), far(codebook, dim), "euclidean", 0.25, 0.7, None)
    assert_same_bits(found[0], wanted[0])
    assert_same_indices(found[1], wanted[1])
    rest = None, 0.25, 0.7, True, True
    right = reference.vector_quantize_backward(upstream, wanted[2], x, codebook, wanted[1], *rest)
    arguments = far(upstream, dim), wanted[2], far(x, dim), far(codebook, dim), wanted[1]
    for mine, gradient in zip(triton.vector_quantize_backward(*arguments, *rest), right, strict=True):
        assert_same_bits(mine, gradient)


def test_heads_sums_updates_and_stages():
    x, codebooks = torch.randn(3, 5, 4), torch.randn(3, 2, 6, 4)
    quantized, stages, _ = reference.residual_quantize(x, codebooks, "euclidean")
    found = triton.residual_quantize(far(x), far(codebooks), "euclidean")
    assert_same_bits(found[0], quantized)
    assert_same_indices(found[1], stages)
    arguments = x, torch.ones(2), x, codebooks, stages, True, True
    mine = triton.residual_quantize_backward(far(x), torch.ones(2), far(x), far(codebooks), stages, True, True)
    for gradient, right in zip(mine, reference.residual_quantize_backward(*arguments), strict=True):
        assert_same_bits(gradient, right)
    counts, sums = reference.code_sums(x, stages[..., 0], 6, None, True)
    for found, right in zip(triton.code_sums(far(x), stages[..., 0], 6, None, True), (counts, sums), strict=True):
        assert_same_bits(found, right)
    state = codebooks[:, 0], counts + 0.5, sums.clone(), counts, sums
    mine = [far(t) for t in state]
    wanted = [t.clone() for t in state]
    reference.ema_update_(*wanted, 0.75, 1e-5)
    triton.ema_update_(*mine, 0.75, 1e-5)
    for found, right in zip(mine, wanted, strict=True):
        assert_same_bits(found, right)
