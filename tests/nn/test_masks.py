"""Masked tokens are as if they were not there, in every combination of options, also where the peer crashes."""

from __future__ import annotations

import pytest
import torch
from common import DIM, assert_same, pair, step

import fastvq

OPTIONS = {
    "plain": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "heads": {"heads": 2},
    "heads, projected": {"heads": 3, "codebook_dim": 2},
    "separate heads": {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    "projected": {"codebook_dim": 3},
    "channel first": {"channel_last": False},
    "channel first, projected": {"channel_last": False, "codebook_dim": 3},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, separate heads": {
        "learnable_codebook": True,
        "ema_update": False,
        "heads": 2,
        "separate_codebook_per_head": True,
    },
}
LENS = torch.tensor([5, 0, 11, 1])
MASK = torch.arange(11) < LENS[:, None]


def lay_out(x: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
    return x.transpose(1, 2) if options.get("channel_last") is False else x


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("padding", [0.0, 1e4, float("nan")])
def test_as_if_the_padding_were_not_there(name: str, padding: float) -> None:
    options = OPTIONS[name]
    masked, alone = pair(**options)[0], pair(**options)[0]
    for seed in range(3):
        x = torch.randn(4, 11, DIM, generator=torch.Generator().manual_seed(seed))
        padded = torch.where(MASK[..., None], x, padding)
        results = []
        for layer, rows, mask in ((masked, padded, MASK), (alone, x[MASK][None], None)):
            layer.zero_grad()
            tokens = lay_out(rows, options).clone().requires_grad_()
            quantized, indices, loss = layer(tokens, mask=mask)
            (quantized.sin().sum() + loss).backward()
            flat, grad = lay_out(quantized, options), lay_out(tokens.grad, options)
            keep = slice(None) if mask is None else mask
            results.append(
                {"quantized": flat[keep].reshape(-1, DIM), "grad": grad[keep].reshape(-1, DIM), "loss": loss}
                | {"indices": indices[keep].reshape(int(MASK.sum()), -1)}
                | {n: p.grad for n, p in layer.named_parameters()}
                | dict(layer.state_dict())
            )
            if mask is not None:
                assert (flat[~mask] == 0).all()
                assert (grad[~mask] == 0).all()
                assert (indices[~mask] == -1).all()
        assert_same({k: v.detach() for k, v in results[0].items()}, {k: v.detach() for k, v in results[1].items()})


@pytest.mark.parametrize("name", OPTIONS)
def test_lens_is_a_mask(name: str) -> None:
    options = OPTIONS[name]
    by_mask, by_lens = pair(**options)[0], pair(**options)[0]
    x = lay_out(torch.randn(4, 11, DIM), options)
    assert_same(step(by_lens, x, lens=LENS), step(by_mask, x, mask=MASK), rtol=0, atol=0)
    assert_same(step(by_lens, x, lens=LENS.int()), step(by_mask, x, mask=MASK), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_without_tokens_changes_no_code(name: str) -> None:
    options = OPTIONS[name]
    layer = pair(**options)[0]
    x = lay_out(torch.randn(4, 11, DIM), options).requires_grad_()
    quantized, indices, loss = layer(x, mask=torch.zeros(4, 11, dtype=torch.bool))
    (quantized.sum() + loss).backward()
    assert (quantized == 0).all()
    assert (indices == -1).all()
    assert loss == 0
    assert (x.grad == 0).all()
    assert layer.codebook.isfinite().all()


def test_codes_and_outputs_of_eval_mode() -> None:
    layer = pair()[0].eval()
    x = torch.randn(4, 11, DIM)
    quantized, indices, _ = layer(x, mask=MASK)
    plain, plain_indices, _ = layer(x)
    assert torch.equal(quantized[MASK], plain[MASK])
    assert torch.equal(indices, torch.where(MASK, plain_indices, -1))


def test_mask_of_any_layout_is_not_limited_to_leading_tokens() -> None:
    layer = fastvq.VectorQuantize(DIM, 5, heads=2)
    mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    quantized, indices, _ = layer(torch.randn(4, 11, DIM), mask=mask)
    assert torch.equal((indices == -1).all(-1), ~mask)
    assert torch.equal((indices == -1).any(-1), ~mask)
    assert torch.equal((quantized == 0).all(-1), ~mask)
