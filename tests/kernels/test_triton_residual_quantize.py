"""Triton's residual_quantize in the interpreter, against the reference bit for bit, all tensors between guards."""

import pytest
import torch
from compare import assert_no_less_exact, assert_same_bits, assert_same_indices
from families import DTYPES, make
from fastvq.kernels import code_sums
from guard import GuardedAllocations, guarded

from fastvq.backends import reference, triton


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(code_sums, "UNROLL", 3)


def check_backward(x, codebooks, needs=(True, True), guard="end"):
    stages, size = codebooks.shape[-3:-1]
    indices = torch.randint(size, (*x.shape[:-1], stages))
    upstream = torch.randn(x.shape).to(x.dtype)
    grad_losses = torch.randn(stages).to(reference.working_dtype(x, codebooks))
    wanted = reference.residual_quantize_backward(upstream, grad_losses, x, codebooks, indices, *needs)
    tensors = [guarded(t, guard) for t in (upstream, grad_losses, x, codebooks, indices)]
    with GuardedAllocations(guard):
        found = triton.residual_quantize_backward(*tensors, *needs)
    for gradient, right, name in zip(found, wanted, ("x", "codebooks"), strict=True):
        assert_same_bits(gradient, right, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["scaled_rows", "not_finite"])
def test_gradients_of_families(family, dtype):
    x, codes = make(family, 13, 9, 5, dtype)
    check_backward(x, codes.view(3, 3, 5), guard="start")


@pytest.mark.parametrize(("n", "q", "k", "d"), [(0, 2, 2, 3), (1, 1, 1, 1), (5, 4, 2, 1), (3, 2, 2, 300)])
def test_gradients_of_shapes(n, q, k, d):
    check_backward(torch.randn(n, d), torch.randn(q, k, d))


def test_gradients_with_heads_and_strides():
    image = torch.randn(2, 4, 3, 5).permute(0, 2, 3, 1)
    check_backward(image, torch.randn(4, 2, 3).permute(1, 2, 0))
    check_backward(image, torch.randn(2, 2, 3, 4))
    check_backward(torch._neg_view(image), torch.randn(4, 2, 3, 4)[::2])


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_needed_are_computed(needs):
    check_backward(torch.randn(8, 3), torch.randn(2, 2, 3), needs)


def test_x_is_not_written(monkeypatch):
    """The residual is kept apart, though every stage takes its codes away in place."""
    x = torch.randn(6, 3)
    given = x.clone()
    check_backward(x, torch.randn(3, 2, 3))
    assert_same_bits(x, given)


# ---- forward ------------------------------------------------------------------------------------------------------


def check(x, codebooks, metric="euclidean", guard="end"):
    """Quantized and indices equal the reference's; the losses are as exact."""
    quantized, indices, losses = reference.residual_quantize(x, codebooks, metric)
    x, codebooks = guarded(x, guard), guarded(codebooks, guard)
    with GuardedAllocations(guard):
        found = triton.residual_quantize(x, codebooks, metric)
    assert_same_indices(found[1], indices)
    assert_same_bits(found[0], quantized)
    if losses.isfinite().all():
        assert_no_less_exact(found[2], losses, losses.double())
    else:
        assert torch.equal(found[2].isfinite(), losses.isfinite())


def stages_of(family, dtype, n, k, d, stages):
    """Rows, and a codebook a stage."""
    drawn = [make(family, n, k, d, dtype, seed) for seed in range(stages)]
    return drawn[0][0], torch.stack([codebook for _, codebook in drawn])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gaussian", "power_law", "near_tied", "duplicated", "zeros", "not_finite"])
def test_families(family, dtype):
    check(*stages_of(family, dtype, 18, 70, 9, 3), guard="start")


@pytest.mark.parametrize(
    ("n", "q", "k", "d"), [(0, 2, 3, 4), (1, 1, 1, 1), (17, 5, 65, 2), (16, 2, 129, 200), (9, 2, 50, 300)]
)
def test_shapes(n, q, k, d):
    check(*stages_of("gaussian", "float32", n, k, d, q))


def test_heads_strides_and_dot_products():
    x, codebooks = stages_of("gaussian", "float32", 24, 40, 6, 4)
    image = x.reshape(2, 3, 4, 6).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    check(image, codebooks, "dot")
    check(image, codebooks, "cosine")
    check(image, codebooks.reshape(2, 2, 40, 6))
    check(image, codebooks[::2].transpose(1, 2).contiguous().transpose(1, 2))


def test_rows_uncertain_at_a_late_stage_are_taken_again():
    """Twice the same codes, in the second stage only: every row is queued there, with the first stage's choice."""
    x, codebooks = stages_of("gaussian", "float32", 20, 64, 8, 3)
    codebooks[1, 32:] = codebooks[1, :32]
    check(x, codebooks)
