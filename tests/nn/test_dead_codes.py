"""Codes in too little use start again as rows of the batch."""

from __future__ import annotations

import pytest
import torch
from common import DIM
from torch import Tensor, nn

import fastvq

CODES = 37


def layer_with_dead_codes(dead: Tensor, **options: object) -> fastvq.VectorQuantize:
    """Codes far off are dead after one step; the others have been in use and survive it."""
    layer = fastvq.VectorQuantize(DIM, CODES, threshold_ema_dead_code=2, **options)
    book = layer._codebook
    codes = torch.randn(book.embed.shape)
    codes[:, dead] += 1e3
    if layer.use_cosine_sim:
        codes = nn.functional.normalize(codes, dim=-1)
    layer.codebook = codes if layer.separate_codebook_per_head else codes[0]
    book.cluster_size[:] = torch.where(dead, 0.0, 50.0)
    book.embed_avg[:] = book.embed * book.cluster_size[..., None]
    return layer


def matches(codes: Tensor, rows: Tensor) -> Tensor:
    """(K, N): which code is exactly which row."""
    return (codes[:, None] == rows[None]).all(-1)


@pytest.mark.parametrize("options", [{}, {"ema_update": False}, {"use_cosine_sim": True}], ids=str)
def test_each_becomes_another_row(options: dict[str, object]) -> None:
    dead = torch.arange(CODES) % 3 == 0
    layer = layer_with_dead_codes(dead, **options)
    before = layer.codebook.clone()
    x = torch.randn(4, 25, DIM)
    layer(x)
    rows = x.flatten(0, 1)
    if layer.use_cosine_sim:
        rows = nn.functional.normalize(rows, dim=-1, eps=1e-6)
        assert (layer._codebook.cluster_size[0][dead] >= 2).all()
        dead = layer._codebook.cluster_size[0] == 2
    found = matches(layer.codebook, rows)
    assert torch.equal(found.any(1), dead)
    assert found.sum(0).max() == 1
    book = layer._codebook
    assert (book.cluster_size[0][dead] == 2).all()
    assert (book.cluster_size[0][~dead] > 2).all()
    assert torch.equal(book.embed_avg[0][dead], 2 * layer.codebook[dead])
    if layer.ema_update:
        assert not torch.equal(layer.codebook[~dead], before[~dead])
    else:
        assert torch.equal(layer.codebook[~dead], before[~dead])


@pytest.mark.parametrize("options", [{}, {"learnable_codebook": True, "ema_update": False}], ids=str)
@pytest.mark.parametrize("encoder", [False, True])
def test_the_output_comes_from_the_codes_before(options: dict[str, object], encoder: bool) -> None:
    layer = layer_with_dead_codes(torch.ones(CODES, dtype=torch.bool), **options)
    before = layer.codebook.detach().clone()
    quantized, indices, _ = layer(torch.randn(50, DIM, requires_grad=encoder))
    assert not torch.equal(layer.codebook, before)
    assert torch.equal(quantized, before[indices])


@pytest.mark.parametrize("by_mask", [False, True])
def test_with_fewer_rows_than_dead_codes_a_random_subset_is_served(by_mask: bool) -> None:
    dead = torch.arange(CODES) < 20
    counts = torch.zeros(CODES)
    for seed in range(30):
        torch.manual_seed(seed)
        layer = layer_with_dead_codes(dead)
        x = torch.randn(1, 60 if by_mask else 7, DIM)
        mask = torch.randperm(60)[None] < 7 if by_mask else None
        layer(x, mask=mask)
        found = matches(layer.codebook, x[0] if mask is None else x[mask])
        assert found.sum(1).max() == 1
        assert (found.sum(0) == 1).all()  # every row is used, once
        served = found.any(1)
        assert not served[~dead].any()
        assert (layer._codebook.cluster_size[0][dead & ~served] < 2).all()
        counts += served
    assert (counts[dead] > 0).all()  # 0.65 ** 30 = 2e-6 for each


def test_masked_rows_are_never_drawn() -> None:
    layer = layer_with_dead_codes(torch.ones(CODES, dtype=torch.bool))
    mask = torch.arange(80) % 2 == 0
    x = torch.randn(1, 80, DIM)
    layer(x, mask=mask[None])
    found = matches(layer.codebook, x[0])
    served = layer._codebook.cluster_size[0] == 2  # the code nearest to all rows lives on
    assert served.sum() >= CODES - 1
    assert torch.equal(found[:, mask].any(1), served)
    assert not found[:, ~mask].any()


@pytest.mark.parametrize("separate", [False, True])
def test_heads(separate: bool) -> None:
    layer = layer_with_dead_codes(
        torch.arange(CODES) < 9, heads=2, codebook_dim=DIM, separate_codebook_per_head=separate
    )
    x = torch.randn(3, 30, DIM)
    layer(x)
    parts = layer.project_in(x).detach().unflatten(-1, (2, DIM))
    for head, codes in enumerate(layer._codebook.embed):
        rows = parts[..., head, :] if separate else parts
        difference = (codes[:9, None] - rows.reshape(1, -1, DIM)).abs().amax(-1)
        assert (difference.amin(1) < 1e-6).all()
        assert difference.argmin(1).unique().numel() == 9


def test_rows_are_drawn_uniformly() -> None:
    counts = torch.zeros(12)
    x = torch.randn(12, DIM)
    for seed in range(200):
        torch.manual_seed(seed)
        layer = layer_with_dead_codes(torch.arange(CODES) < 3)
        layer(x)
        counts += matches(layer.codebook, x).any(0)
    assert counts.sum() == 600
    assert ((counts - 50).abs() < 30).all()  # 5 standard deviations


def test_without_a_threshold_nothing_is_drawn() -> None:
    layer = fastvq.VectorQuantize(DIM, CODES)
    layer._codebook.cluster_size.fill_(1e-3)
    state = torch.get_rng_state()
    x = torch.ones(50, DIM)
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert matches(layer.codebook, x).sum() == 0


@pytest.mark.parametrize("when", ["eval", "frozen"])
def test_nothing_is_replaced_unless_learning(when: str) -> None:
    layer = layer_with_dead_codes(torch.ones(CODES, dtype=torch.bool))
    before = layer.codebook.clone()
    layer.train(when != "eval")(torch.randn(50, DIM), freeze_codebook=when == "frozen")
    assert torch.equal(layer.codebook, before)


def test_a_learnable_codebook_still_gets_its_gradient() -> None:
    dead = torch.arange(CODES) < 5
    layer = layer_with_dead_codes(dead, learnable_codebook=True, ema_update=False)
    before = layer._codebook.embed.detach().clone()
    x = torch.randn(50, DIM)
    _, indices, loss = layer(x)
    loss.backward()
    codes = before[0].clone().requires_grad_()
    (codes[indices] - x).square().mean().backward()
    torch.testing.assert_close(layer._codebook.embed.grad[0], codes.grad)
    assert matches(layer.codebook.detach(), x)[dead].any(1).all()
