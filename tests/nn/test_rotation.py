"""The rotation trick: the code as it is, and the gradient of the peer's formula."""

from __future__ import annotations

import pytest
import torch
from naive import rotate
from torch import Tensor
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

import fastvq
from fastvq.backends import plain
from fastvq.nn.rotation import rotate_gradient

SHAPES = [(1, 1), (5, 1), (3, 17, 2), (31, 7), (2, 3, 5, 64), (1, 301)]


def ours(x: Tensor, q: Tensor) -> Tensor:
    """With the straight-through gradient that `fastvq.vector_quantize` gives."""
    return rotate_gradient(x, x + (q - x).detach())


def gradient(function, x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    function(x, q).backward(g)
    return x.grad


def triple(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, q, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return x, q, g


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reference", [rotate, rotate_to], ids=["matrix", "peer"])
def test_gradient(shape: tuple[int, ...], reference) -> None:
    x, q, g = triple(shape)
    torch.testing.assert_close(gradient(ours, x, q, g), gradient(reference, x, q, g), rtol=1e-9, atol=1e-10)


def test_rows_are_turned_where_they_lie() -> None:
    x, q, g = (t.transpose(1, 2) for t in triple((3, 31, 199)))
    wanted = gradient(ours, x.contiguous(), q.contiguous(), g.contiguous())
    torch.testing.assert_close(gradient(ours, x, q, g), wanted, rtol=1e-12, atol=1e-14)


def test_no_rows() -> None:
    assert gradient(ours, *triple((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("case", ["same", "opposite", "scaled", "zero x", "zero code", "tiny", "large"])
def test_gradient_where_it_degenerates(case: str) -> None:
    x, q, g = triple((29, 5))
    q = {"same": x, "opposite": -x, "scaled": 3 * x, "zero x": q, "zero code": 0 * q, "tiny": 1e-9 * q, "large": q}[
        case
    ]
    x = {"zero x": 0 * x, "tiny": 1e-8 * x, "large": 1e12 * x}.get(case, x)
    torch.testing.assert_close(gradient(ours, x, q, g), gradient(rotate_to, x, q, g), rtol=1e-8, atol=1e-9)


def test_float32_error_is_no_worse_than_the_peers() -> None:
    x, q, g = triple((4096, 32), torch.float32)
    exact = gradient(rotate, x.double(), q.double(), g.double())
    error = (gradient(ours, x, q, g) - exact).abs().max()
    assert error <= 1.5 * (gradient(rotate_to, x, q, g) - exact).abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_value_and_dtypes(dtype: torch.dtype) -> None:
    x, q, g = triple((29, 5), dtype)
    x.requires_grad_(), q.requires_grad_()
    out = rotate_gradient(x, q)
    assert torch.equal(out, q)
    out.backward(g)
    assert x.grad is None
    assert q.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    exact = gradient(rotate, x.detach().double(), q.detach().double(), g.double())
    torch.testing.assert_close(q.grad.double(), exact, rtol=8 * eps, atol=8 * eps)


def test_nothing_is_materialised_beyond_the_rows() -> None:
    """Backward memory in units of N x D, by the largest tensor that an operator returns."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
            return out

    x, q, g = triple((100, 37))
    with Watch():
        gradient(ours, x, q, g)
    assert max(sizes) == x.numel()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(252, 7), (3, 41, 64), (1, 1, 1), (0, 5)], ids=str)
def test_every_backend_turns_through_the_stages_alike(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against the formula of each stage in float64: kernels for one width of vector, and plain PyTorch."""
    x, _, g = triple(shape, dtype)
    books = torch.randn(3, 9, shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    _, indices, _ = fastvq.residual_quantize(x, books)
    work = torch.promote_types(dtype, torch.float32)
    wanted, residual = torch.zeros(shape, dtype=torch.float64), x.to(work)
    for book, index in zip(books, indices.unbind(-1), strict=True):
        wanted += gradient(rotate, residual.double(), book[index].double(), g.double())
        residual = residual - book[index].to(work)
    eps = torch.finfo(dtype).eps
    for turned in (
        torch.ops.fastvq.rotate_back(g, x, books, indices, None),
        torch.ops.fastvq.rotate_back(g.mT.contiguous().mT, x.mT.contiguous().mT, books, indices, None),
        plain.rotate_back(g, x, books, indices),
    ):
        assert turned.dtype == dtype
        torch.testing.assert_close(turned.double(), wanted, rtol=64 * eps, atol=64 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(252, 7), (3, 41, 64), (1, 1, 1), (0, 5)], ids=str)
def test_sums_of_the_stages(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Those of `code_sums` on the residuals, bit for bit; a NaN row is in none."""
    x, *_ = triple(shape, dtype)
    if x.numel() > 1:
        x[..., 0, 0] = torch.nan
    books = torch.randn(3, 9, shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    _, indices, _ = fastvq.residual_quantize(x, books)
    residual = x.to(torch.promote_types(dtype, torch.float32))
    for way in (x, x.mT.contiguous().mT):
        counts, sums = torch.ops.fastvq.residual_code_sums(way, books, indices, None)
        for mine, theirs in zip((counts, sums), plain.residual_code_sums(x, books, indices), strict=True):
            assert torch.equal(mine, theirs)
    kept = residual.isfinite().all(-1)
    first = fastvq.code_sums(residual, indices[..., 0], 9, mask=kept)
    assert torch.equal(counts[0], first[0])
    assert torch.equal(sums[0], first[1])
