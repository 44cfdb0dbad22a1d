"""The first codebook from the first batch."""

from __future__ import annotations

import pytest
import torch
from common import CODES, DIM, assert_same, pair, step
from torch import Tensor

import fastvq


def blobs(rows: int, centres: int, dim: int = DIM, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means = 10 * torch.randn(centres, dim, generator=generator)
    return means[torch.arange(rows) % centres] + 0.01 * torch.randn(rows, dim, generator=generator), means


def consistent(layer: fastvq.VectorQuantize) -> None:
    """The averages give the codes back."""
    book = layer._codebook
    total = book.cluster_size.sum(-1, keepdim=True)
    smoothed = (book.cluster_size + book.eps) / (total + book.codebook_size * book.eps) * total
    torch.testing.assert_close(book.embed_avg / smoothed[..., None], book.embed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kmeans_iters": 1},
        {"kmeans_iters": 3, "use_cosine_sim": True},
        {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 3},
        {"learnable_codebook": True, "ema_update": False},
        {"freeze_codebook": True},
        {"accept_image_fmap": True},
        {"channel_last": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_peers_from_the_same_seed(options: dict[str, object], training: bool) -> None:
    """To 2e-5: the peer divides the means by Laplace-smoothed counts, (count + 1e-5) / count off."""
    ours, theirs = pair(kmeans_init=True, **options)
    ours.train(training), theirs.train(training)
    shape = {"accept_image_fmap": (6, DIM, 5, 7), "channel_last": (6, DIM, 35)}
    x = torch.randn(next((s for k, s in shape.items() if k in options), (6, 35, DIM)))
    for _ in range(2):
        torch.manual_seed(3)
        mine = ours(x)
        torch.manual_seed(3)
        other = theirs(x)
        assert torch.equal(mine[1], other[1])
        torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-4)
        assert_same(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-4)
    assert bool(ours._codebook.initted)
    if not training:
        consistent(ours)


def test_finds_the_blobs() -> None:
    rows, means = blobs(400, 4)
    for seed in range(20):
        torch.manual_seed(seed)
        layer = fastvq.VectorQuantize(DIM, 4, kmeans_init=True).eval()
        quantized, _, _ = layer(rows[None])
        if (quantized - rows).abs().max() < 0.1:  # k-means may end in a local minimum, not from every seed
            torch.testing.assert_close(layer.codebook[layer(means)[1]], means, rtol=0, atol=0.02)
            return
    pytest.fail("no seed of 20 found four blobs")


def test_more_iterations_fit_no_worse() -> None:
    x = torch.randn(1, 500, DIM)
    errors = []
    for iterations in (0, 1, 2, 5, 10):
        torch.manual_seed(0)
        layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True, kmeans_iters=iterations).eval()
        errors.append((layer(x)[0] - x).square().mean().item())
        consistent(layer)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_without_iterations_the_codes_are_rows() -> None:
    x = torch.randn(50, DIM)
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True, kmeans_iters=0).eval()
    layer(x)
    found = (layer.codebook[:, None] == x[None]).all(-1)
    assert (found.sum(1) == 1).all()
    assert (found.sum(0) <= 1).all()
    consistent(layer)


def test_a_mean_without_rows_stays_where_it_was() -> None:
    """The peer makes it the zero vector."""
    x = torch.full((40, DIM), 3.0)
    layer = fastvq.VectorQuantize(DIM, 5, kmeans_init=True).eval()
    layer(x)
    assert (layer.codebook == 3.0).all()
    assert layer._codebook.cluster_size.tolist() == [[40, 0, 0, 0, 0]]
    consistent(layer)


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "separate_codebook_per_head": True}], ids=str)
def test_masked_rows_take_no_part(options: dict[str, object]) -> None:
    mask = torch.rand(4, 60, generator=torch.Generator().manual_seed(0)) < 0.4
    x = torch.rand(4, 60, DIM) + torch.where(mask, 0.0, 1e6)[..., None]
    layer, _ = pair(kmeans_init=True, **options)
    inner = layer.project_in(x[mask])
    layer.eval()(x, mask=mask)
    assert layer.codebook.min() >= inner.min()
    assert layer.codebook.max() <= inner.max()
    heads = 1 if options.get("separate_codebook_per_head") else layer.heads
    assert layer._codebook.cluster_size.sum(-1).tolist() == [mask.sum() * heads] * len(layer._codebook.embed)


def test_fewer_rows_than_codes() -> None:
    x = torch.randn(5, DIM)
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True)
    with pytest.warns(RuntimeWarning, match=r"13 codes from 5 rows"):
        quantized, _, _ = layer.eval()(x)
    torch.testing.assert_close(quantized, x, rtol=1e-6, atol=1e-7)  # every row is drawn before any is drawn twice
    consistent(layer)


def test_fewer_unmasked_rows_than_codes_and_none() -> None:
    x = torch.randn(1, 40, DIM)
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True).eval()
    mask = torch.arange(40)[None] < 3
    quantized, _, _ = layer(x, mask=mask)
    torch.testing.assert_close(quantized[mask], x[mask], rtol=1e-6, atol=1e-7)
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True)
    for _ in range(2):
        layer(x, mask=torch.zeros(1, 40, dtype=torch.bool))
        assert all(value.isfinite().all() for value in layer.state_dict().values())


def test_an_empty_batch_leaves_it_to_the_next() -> None:
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True)
    layer.eval()(torch.empty(0, 7, DIM))
    assert not bool(layer._codebook.initted)
    layer(torch.randn(30, DIM))
    assert bool(layer._codebook.initted)


def test_only_the_first_batch_counts() -> None:
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True).eval()
    layer(torch.randn(30, DIM))
    codes = layer.codebook.clone()
    layer(torch.randn(30, DIM))
    assert torch.equal(layer.codebook, codes)
    assert "loss" in step(layer.train(), torch.randn(30, DIM))
