"""The CUDA kernels round a search, on the CPU: values and gradients of the reference bit for bit, between guards."""

import pytest
import torch
from compare import assert_same_bits
from families import DTYPES, make
from guard import GuardedAllocations, guarded

from fastvq.backends import cuda, reference

pytestmark = pytest.mark.usefixtures("kernels")


def wanted_gather(x, codebook, indices, weight, mask):
    """What the reference makes of given indices."""
    quantized = reference._gather(codebook, indices).to(x.dtype)
    squares = reference._difference(x, codebook, indices, mask).square().sum()
    loss = weight * (squares / reference._elements(x, mask))
    return quantized, loss.to(reference.working_dtype(x, codebook))


def wanted_counts(x, codebook, indices, mask):
    """How many finite rows that the mask keeps have each index."""
    kept = x.isfinite().all(-1)
    kept = kept if mask is None else kept & mask
    return reference.code_sums(x, indices, codebook.shape[-2], kept, codebook.dim() == 3)[0]


def check(x, codebook, mask=None, guard="end", weights=(0.25, 0.7), needs=(True, True)):
    """Forward (after the search) and backward against the reference, every tensor next to a forbidden page."""
    size = codebook.shape[-2]
    indices = torch.randint(size, x.shape[:-1])
    upstream = torch.randn(x.shape).to(x.dtype)
    grad_loss = torch.tensor(0.3, dtype=reference.working_dtype(x, codebook))
    rest = (*weights, *needs)
    quantized, loss = wanted_gather(x, codebook, indices, sum(weights), mask)
    taken = wanted_counts(x, codebook, indices, mask)
    wanted = reference.vector_quantize_backward(upstream, grad_loss, x, codebook, indices, mask, *rest)

    x, codebook, indices, upstream = (guarded(t, guard) for t in (x, codebook, indices, upstream))
    mask = None if mask is None else guarded(mask, guard)
    with GuardedAllocations(guard):
        mine, my_loss = cuda.gather(x, codebook, indices, sum(weights), mask)
        counts = guarded(torch.zeros(codebook.shape[:-1], dtype=torch.int64), guard)
        again = cuda.gather(x, codebook, indices, sum(weights), mask, counts)
        found = cuda.vector_quantize_backward(upstream, guarded(grad_loss), x, codebook, indices, mask, *rest)
    assert_same_bits(mine, quantized, "quantized")
    for counted, alone in zip(again, (mine, my_loss), strict=True):
        assert_same_bits(counted, alone, "with counts")
    assert counts.tolist() == taken.tolist()
    torch.testing.assert_close(my_loss, loss, rtol=4 * torch.finfo(loss.dtype).eps, atol=0, equal_nan=True)
    for gradient, right, name in zip(found, wanted, ("x", "codebook"), strict=True):
        assert_same_bits(gradient, right, f"gradient of {name}")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["scaled_rows", "not_finite"])
def test_families(family, dtype):
    check(*make(family, 23, 4, 5, dtype), guard="start")
    check(*make(family, 23, 4, 16, dtype), guard="start")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("x", "codebook"), [(torch.float16, torch.float64), (torch.float64, torch.bfloat16), (torch.float32, torch.float16)]
)
def test_mixed_dtypes(x, codebook):
    check(torch.randn(9, 4).to(x), torch.randn(3, 4).to(codebook))
    check(torch.randn(9, 8).to(x), torch.randn(3, 8).to(codebook))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("n", "k", "d"), [(0, 2, 3), (1, 1, 1), (1030, 2, 1), (3, 2, 300), (40, 9, 252), (5, 3, 1023)])
def test_shapes(n, k, d):
    check(torch.randn(n, d), torch.randn(k, d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_in_vectors_in_several_blocks(dtype, seed):
    check(torch.randn(600, 32).to(dtype), torch.randn(40, 32).to(dtype))
    check(torch.randn(2, 600, 32).to(dtype), torch.randn(2, 3, 32).to(dtype), torch.rand(2, 600) < 0.5)


@pytest.mark.usefixtures("way")
def test_masks_and_heads():
    x, codebook, mask = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4), torch.rand(2, 3, 5) < 0.6
    x[~mask] = torch.nan
    check(x, codebook, mask)
    check(x, codebook[1], mask)
    check(x, codebook[0], torch.zeros_like(mask))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_is_computed(needs):
    check(torch.randn(8, 3), torch.randn(2, 3), needs=needs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x[:, ::2, 1:],
        lambda x: x[::2, 1:, ::2],
        lambda x: x[:1, :1, :1].expand(2, 3, 4, 8),
        torch._neg_view,
    ],
)
def test_strided_inputs(view):
    x = view(torch.randn(3, 8, 4, 8))
    d = x.shape[-1]
    check(x, torch.randn(d, 4).t())
    check(x, torch.randn(4, d))
    check(x[:2], torch._neg_view(torch.randn(2, 8, d)[:, ::2]))


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_tensors_that_do_not_begin_at_16_bytes(offset):
    x = torch.randn(7 * 8 + offset)[offset:].view(7, 8)
    check(x, torch.randn(3 * 8 + offset)[offset:].view(3, 8))
    check(x, torch.randn(3, 12)[:, 4:])


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_the_whole_operator(metric):
    x, codebook, mask = *make("gaussian", 9, 17, 5, heads=2), torch.rand(2, 9) < 0.6
    wanted = reference.vector_quantize_counted(x, codebook, metric, 0.25, 0.7, mask)
    with GuardedAllocations():
        tensors = guarded(x), guarded(codebook), metric, 0.25, 0.7, guarded(mask)
        plain, found = cuda.vector_quantize(*tensors), cuda.vector_quantize_counted(*tensors)
    assert_same_bits(found[0], wanted[0])
    assert found[1].tolist() == wanted[1].tolist()
    assert found[3].tolist() == wanted[3].tolist()
    for counted, alone in zip(found[:3], plain, strict=True):
        assert_same_bits(counted, alone)
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-6, atol=0)


def test_an_upstream_gradient_that_is_one_number_everywhere():
    x, codebook, indices = torch.randn(7, 4), torch.randn(2, 4), torch.randint(2, (7,))
    arguments = torch.ones(()).expand(7, 4), torch.tensor(1.0), x, codebook, indices, None, 0.5, 1.0, True, False
    assert_same_bits(cuda.vector_quantize_backward(*arguments)[0], reference.vector_quantize_backward(*arguments)[0])


def test_an_image_is_read_where_it_lies(monkeypatch):
    """Forward and the gradient to x copy nothing of the size of x but what they return."""
    x = torch.randn(2, 16, 8, 8).permute(0, 2, 3, 1)
    codebook, indices = torch.randn(4, 16), torch.randint(4, (2, 8, 8))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("copy"))
    cuda.gather(x, codebook, indices, 1.0, None)
    cuda.vector_quantize_backward(x, torch.tensor(1.0), x, codebook, indices, None, 1.0, 1.0, True, False)


def test_a_small_codebook_has_its_gradient_without_a_sort(monkeypatch):
    """In several blocks of 8192 rows; integers and powers of two, exact in any order."""
    monkeypatch.setattr(cuda, "_rows_by_code", lambda *_, **__: pytest.fail("sorted"))
    x, codebook = torch.randint(-9, 9, (8200, 2)).float(), torch.randint(-9, 9, (5, 2)).float()
    arguments = torch.zeros_like(x), torch.tensor(8200.0), x, codebook, torch.randint(5, (8200,)), None, 0.5, 2.0
    found, wanted = (way.vector_quantize_backward(*arguments, False, True) for way in (cuda, reference))
    assert_same_bits(found[1], wanted[1])
    with pytest.raises(pytest.fail.Exception, match="sorted"):
        cuda.vector_quantize_backward(*arguments[:3], torch.randn(4000, 2).repeat(4, 1), *arguments[4:], False, True)


def test_a_codebook_gradient_by_chunks(by_sorting, monkeypatch):
    """Integers and powers of two: exact in any order, so that a lost or doubled chunk is all that can differ."""
    monkeypatch.setattr(cuda, "CHUNK", 4)
    x, codebook = torch.randint(-9, 9, (2, 70, 4)).float(), torch.randint(-9, 9, (2, 2, 4)).float()
    for indices in (torch.zeros(2, 70, dtype=torch.int64), (torch.rand(2, 70) < 0.3).long()):
        arguments = torch.zeros_like(x), torch.tensor(140.0), x, codebook, indices, None, 0.5, 2.0, False, True
        found, wanted = cuda.vector_quantize_backward(*arguments), reference.vector_quantize_backward(*arguments)
        assert_same_bits(found[1], wanted[1])
