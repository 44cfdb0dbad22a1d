"""residual_quantize: stage after stage, each with its canonical code, against a plain loop of searches."""

import pytest
import torch
from compare import assert_no_less_exact, assert_same_bits, assert_same_indices, expected, threads
from families import DTYPES, FAMILIES, make
from torch.nn import functional as F

import fastvq


def stages(family, n, q, k, d, dtype="float32", seed=0):
    """x (n, d) and codebooks (q, k, d); each stage's codes half the size of those before."""
    x, codebooks = zip(*(make(family, n, k, d, dtype, seed + stage) for stage in range(q)), strict=True)
    return x[0], torch.stack([codes * 0.5**stage for stage, codes in enumerate(codebooks)])


def by_definition(x, codebooks):
    """Quantized, indices and losses; residuals and sums rounded once a stage, in the working dtype."""
    working = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    residual, quantized, indices, losses = x.to(working), None, [], []
    for codebook in codebooks:
        nearest, _ = expected(residual, codebook)
        code = codebook[nearest].to(working)
        losses.append((residual.double() - code.double()).square().mean())
        residual = residual - code
        quantized = code if quantized is None else quantized + code
        indices.append(nearest)
    return quantized.to(x.dtype), torch.stack(indices, -1), torch.stack(losses).to(working)


def naive(x, codebooks):
    """Distance matrix, argmin, one-hot, a stage at a time; every loss reaches x and its own stage's codes."""
    residual, quantized, indices, losses = x, torch.zeros_like(x), [], []
    for codebook in codebooks:
        nearest = (residual.unsqueeze(-2) - codebook).square().sum(-1).argmin(-1)
        q = F.one_hot(nearest, codebook.shape[0]).to(x.dtype) @ codebook
        losses.append(F.mse_loss(residual, q))
        residual = residual - q.detach()
        quantized = quantized + q
        indices.append(nearest)
    return x + (quantized - x).detach(), torch.stack(indices, -1), torch.stack(losses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_definition(backend, family, dtype):
    for n, q, k, d in ((101, 4, 33, 7), (40, 1, 1, 1), (17, 3, 130, 31)):
        x, codebooks = stages(family, n, q, k, d, dtype, seed=n)
        wanted = by_definition(x, codebooks)
        quantized, indices, losses = fastvq.residual_quantize(x, codebooks, backend=backend)
        assert_same_indices(indices, wanted[1], f"{n, q, k, d}")
        assert_same_bits(quantized, wanted[0], f"{n, q, k, d}")
        rtol = 3 * torch.finfo(losses.dtype).eps
        torch.testing.assert_close(losses, wanted[2], rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_other_metrics_choose_by_dot_product(backend, metric):
    x, codebooks = stages("normalised", 60, 3, 20, 6, seed=1)
    _, indices, _ = fastvq.residual_quantize(x, codebooks, metric=metric, backend=backend)
    residual = x
    for stage, codebook in enumerate(codebooks):
        assert_same_indices(indices[:, stage], expected(residual, codebook, metric)[0], f"stage {stage}")
        residual = residual - codebook[indices[:, stage]]


def test_one_stage_is_vector_quantize(backend):
    x, codebooks = stages("gaussian", 50, 1, 12, 5, seed=2)
    quantized, indices, losses = fastvq.residual_quantize(x, codebooks, backend=backend)
    other = fastvq.vector_quantize(x, codebooks[0], backend=backend)
    assert_same_bits(quantized, other[0])
    assert_same_indices(indices.squeeze(-1), other[1])
    assert_same_bits(losses[0], other[2])


@pytest.mark.parametrize("family", ["gaussian", "clustered", "offset", "power_law", "outlier_dimension"])
def test_gradients_are_no_less_exact_than_plain_torch(backend, family):
    x, codebooks = stages(family, 123, 4, 17, 12, seed=3)
    upstream, weights = torch.randn(123, 12), torch.tensor([1.0, 0.5, -2.0, 3.0])
    results = []
    for function, dtype in ((fastvq.residual_quantize, x.dtype), (naive, x.dtype), (naive, torch.float64)):
        options = {"backend": backend} if function is not naive else {}
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, codebooks)]
        quantized, indices, losses = function(*leaves, **options)
        total = (quantized * upstream).sum() + (losses * weights).sum()
        # Straight-through alone reaches x; the codes learn by their losses.
        results.append((indices, losses.detach(), *torch.autograd.grad(total, leaves)))
    found, plain, truth = results
    assert_same_indices(found[0], truth[0])
    assert_same_indices(plain[0], truth[0], "plain torch, on data without near ties")
    for name, mine, theirs, right in zip(("losses", "x", "codebooks"), found[1:], plain[1:], truth[1:], strict=True):
        assert_no_less_exact(mine, theirs, right, what=name)


def test_gradcheck(backend):
    """The codes are constants to x but not to their own loss, so each input is checked by itself."""
    x, codebooks = stages("clustered", 12, 3, 5, 3, "float64", seed=4)

    def of_x(x):
        return fastvq.residual_quantize(x, codebooks, backend=backend)[2]

    assert torch.autograd.gradcheck(of_x, x.clone().requires_grad_())

    def last_stage(last):
        """Earlier residuals do not depend on the last codebook: here the numeric derivative is the whole one."""
        return fastvq.residual_quantize(x, torch.cat([codebooks[:-1], last[None]]), backend=backend)[2]

    assert torch.autograd.gradcheck(last_stage, codebooks[-1].clone().requires_grad_())


def test_straight_through_alone(backend):
    x, codebooks = stages("gaussian", 30, 3, 7, 4, seed=5)
    x.requires_grad_()
    codebooks.requires_grad_()
    quantized, indices, _ = fastvq.residual_quantize(x, codebooks, backend=backend)
    assert not indices.requires_grad
    upstream = torch.randn(30, 4)
    grad_x, grad_codes = torch.autograd.grad(quantized, [x, codebooks], upstream)
    assert_same_bits(grad_x, upstream)
    assert grad_codes.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_have_their_own_codebooks(backend, dtype):
    pairs = [stages("gaussian", 30, 3, 9, 5, dtype, seed=10 * head) for head in range(2)]
    x, codebooks = (torch.stack(t) for t in zip(*pairs, strict=True))
    quantized, indices, losses = fastvq.residual_quantize(x.reshape(2, 5, 6, 5), codebooks, backend=backend)
    assert indices.shape == (2, 5, 6, 3)
    total = 0.0
    for head in range(2):
        wanted = by_definition(x[head], codebooks[head])
        assert_same_bits(quantized[head].reshape(30, 5), wanted[0], f"head {head}")
        assert_same_indices(indices[head].reshape(30, 3), wanted[1], f"head {head}")
        total = total + wanted[2].double() / 2
    torch.testing.assert_close(losses, total.to(losses.dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)])
def test_leading_shapes(backend, shape):
    x, codebooks = torch.randn(*shape, 6, requires_grad=True), torch.randn(3, 9, 6, requires_grad=True)
    quantized, indices, losses = fastvq.residual_quantize(x, codebooks, backend=backend)
    assert quantized.shape == (*shape, 6)
    assert indices.shape == (*shape, 3)
    assert losses.shape == (3,)
    assert losses.isfinite().all()
    if x.numel() == 0:
        assert losses.eq(0).all()
    grads = torch.autograd.grad(quantized.sum() + losses.sum(), [x, codebooks])
    assert [g.shape for g in grads] == [x.shape, codebooks.shape]
    assert grads[1].isfinite().all()


def test_strided_inputs(backend):
    images = torch.randn(3, 6, 5, 7)
    x = images.permute(0, 2, 3, 1)
    codebooks = torch.randn(6, 20, 4).permute(2, 1, 0)
    wanted = by_definition(x.reshape(-1, 6), codebooks.contiguous())
    quantized, indices, losses = fastvq.residual_quantize(x, codebooks, backend=backend)
    assert_same_bits(quantized.reshape(-1, 6), wanted[0])
    assert_same_indices(indices.reshape(-1, 4), wanted[1])
    torch.testing.assert_close(losses, wanted[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_depends_on_the_number_of_threads(backend, dtype):
    x, codebooks = stages("gaussian", 5003, 3, 40, 12, dtype, seed=6)
    x.requires_grad_()
    codebooks.requires_grad_()
    results = []
    for number in (1, 2, 3, 2):
        with threads(number):
            quantized, indices, losses = fastvq.residual_quantize(x, codebooks, backend=backend)
            grads = torch.autograd.grad(quantized.sum() + losses.sum(), [x, codebooks])
        results.append((quantized, indices, losses, *grads))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same_bits(second.detach(), first.detach())


def test_each_stage_brings_the_error_down():
    x, codebooks = stages("gaussian", 500, 6, 256, 4, seed=7)
    codebooks[:, 0] = 0  # a code that changes nothing, so no stage can make it worse
    losses = fastvq.residual_quantize(x, codebooks)[2]
    assert losses.diff().le(0).all()
    assert losses[-1] < 0.1 * losses[0]
