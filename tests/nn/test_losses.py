"""The losses of the layer against the naive formulas, in float64, values and gradients; and codes drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastvq
from fastvq.nn import losses

MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)  # no row at the third place


def same(ours: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Fails unless values and gradients are equal to the rounding of float64."""
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    values = ours(*leaves), naive(*leaves)
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-13)
    gradients = [torch.autograd.grad(value, leaves) for value in values]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def naive_logits(rows: Tensor, codes: Tensor, metric: str) -> Tensor:
    """(H, G, P, K)."""
    if metric == "cosine":
        return torch.einsum("hgpd,hkd->hgpk", rows, codes)
    return -(rows.unsqueeze(-2) - codes[:, None, None]).square().sum(-1).clamp(min=1e-8).sqrt()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_and_diversity(metric: str, heads: int, masked: bool) -> None:
    rows, codes = torch.randn(heads, 3, 5, 4), torch.randn(heads, 11, 4)
    mask = MASK.expand(heads, 3, 5) if masked else None
    kept = torch.ones(heads, 3, 5, dtype=torch.bool) if mask is None else mask
    indices = torch.randint(-1, 11, (heads, 3, 5))

    def naive_cross_entropy(x: Tensor, c: Tensor) -> Tensor:
        used = kept & (indices >= 0)
        return functional.cross_entropy(naive_logits(x, c, metric)[used], indices[used])

    def naive_diversity(x: Tensor, c: Tensor) -> Tensor:
        chances = (naive_logits(x, c, metric) * 3).softmax(-1)
        entropies = []
        for place in range(5):
            here = chances[:, :, place][kept[:, :, place]]
            if len(here):
                mean = here.mean(0)
                entropies.append(-(mean * mean.clamp(min=1e-5).log()).sum())
        return -torch.stack(entropies).mean()

    same(lambda x, c: losses.cross_entropy(x, c, indices, mask, metric=metric), naive_cross_entropy, rows, codes)
    same(lambda x, c: losses.diversity(x, c, mask, temperature=3.0, metric=metric), naive_diversity, rows, codes)
    same(
        lambda x, c: losses.dense_cross_entropy(naive_logits(x, c, metric), indices, mask),
        naive_cross_entropy,
        rows,
        codes,
    )
    same(
        lambda x, c: losses.dense_diversity(naive_logits(x, c, metric), mask, temperature=3.0),
        naive_diversity,
        rows,
        codes,
    )


@pytest.mark.parametrize("shape", [(1, 13, 4), (2, 5, 9), (1, 1, 1)], ids=str)
def test_orthogonal(shape: tuple[int, int, int]) -> None:
    def naive(codes: Tensor) -> Tensor:
        unit = functional.normalize(codes, dim=-1)
        return torch.stack([(c @ c.t()).square().mean() - 1 / len(c) for c in unit]).mean()

    codes = torch.randn(shape)
    same(lambda c: losses.orthogonal(c, None, None), naive, codes)
    active = torch.zeros(shape[:2], dtype=torch.bool)
    active[:, ::2] = True
    same(lambda c: losses.orthogonal(c, active, None), lambda c: naive(c[:, ::2]), codes)


def test_orthogonal_of_a_random_part() -> None:
    """No more codes than asked for, of the active ones alone, and each of them at some time."""
    codes = torch.randn(1, 12, 3).requires_grad_()
    active = torch.arange(12).expand(1, 12) < 7
    counts = torch.zeros(12)
    for _ in range(40):
        (gradient,) = torch.autograd.grad(losses.orthogonal(codes, active, 4), codes)
        used = gradient[0].abs().sum(-1) > 0
        assert used.sum() == 4
        counts += used
    assert ((counts > 0) == active[0]).all()
    whole = losses.orthogonal(codes[:, :7], None, None)
    torch.testing.assert_close(losses.orthogonal(codes, active, 9), whole)


def test_without_any_row_every_loss_is_zero() -> None:
    rows, codes = torch.randn(1, 2, 3, 4), torch.randn(1, 5, 4)
    mask, none = torch.zeros(1, 2, 3, dtype=torch.bool), torch.full((1, 2, 3), -1)
    assert losses.cross_entropy(rows, codes, none, None, metric="euclidean") == 0
    assert losses.diversity(rows, codes, mask, temperature=1.0, metric="euclidean") == 0
    assert losses.masked_mean(losses.commitment(rows, rows + 1), mask) == 0


def test_the_layer_draws_codes_by_their_chances() -> None:
    """In training, at the temperature of the constructor or the call; else the nearest."""
    layer = fastvq.VectorQuantize(4, 9, stochastic_sample_codes=True, sample_codebook_temp=0.5, freeze_codebook=True)
    layer.codebook = torch.randn(9, 4)
    x = torch.randn(1, 1, 4).expand(2, 10_000, 4)
    distances = torch.cdist(x[0, :1].double(), layer.codebook.double())[0]
    for call, temperature in ((None, 0.5), (2.0, 2.0)):
        quantized, indices, _ = layer(x, sample_codebook_temp=call)
        assert torch.equal(quantized, layer.codebook[indices])
        expected = 20_000 * (-distances / temperature).softmax(0)
        counts = torch.bincount(indices.flatten(), minlength=9)
        assert ((counts - expected).square() / expected.clamp(min=1)).sum() < 8 + 6 * math.sqrt(16)
    assert (layer(x, sample_codebook_temp=0.0)[1] == distances.argmin()).all()
    assert (layer.eval()(x)[1] == distances.argmin()).all()


def test_gumbel_straight_through_has_the_gradient_of_the_softmax() -> None:
    layer = fastvq.VectorQuantize(4, 9, straight_through=True, sample_codebook_temp=0.5, commitment_weight=0.0)
    layer.codebook = torch.randn(9, 4)
    x, codes = torch.randn(30, 4, requires_grad=True), layer.codebook.clone()
    quantized, indices, _ = layer(x)
    assert torch.equal(quantized, codes[indices])
    weights = torch.randn(30, 4)
    (gradient,) = torch.autograd.grad((quantized * weights).sum(), x)
    chances = (-torch.cdist(x, codes) / 0.5).softmax(-1)
    (naive,) = torch.autograd.grad((chances @ codes * weights).sum(), x)
    torch.testing.assert_close(gradient, naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"commitment_weight": 0.0}, {}], ids=str)
def test_the_loss_of_narrow_layers_is_float32(options: dict[str, float]) -> None:
    layer = fastvq.VectorQuantize(dim=12, codebook_size=16, orthogonal_reg_weight=0.5, **options).bfloat16()
    assert layer(torch.randn(2, 10, 12, dtype=torch.bfloat16))[2].dtype == torch.float32
