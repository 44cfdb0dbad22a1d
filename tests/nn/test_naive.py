"""A hundred training steps against the naive formulation: losses, gradients, state, and the weights around it."""

from __future__ import annotations

import pytest
import torch
from common import CODES, DIM, give_codes
from naive import NaiveVQ
from torch import nn

import fastvq

MODES = {
    "ema": {},
    "ema, straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "cosine, straight through": {"use_cosine_sim": True, "rotation_trick": False},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, straight through": {"learnable_codebook": True, "ema_update": False, "rotation_trick": False},
}


def both(options: dict[str, bool], dtype: torch.dtype) -> tuple[fastvq.VectorQuantize, NaiveVQ]:
    ours = fastvq.VectorQuantize(DIM, CODES, decay=0.9, commitment_weight=0.25, **options)
    give_codes(ours)
    ours = ours.to(dtype)
    ours.codebook = ours.codebook.detach()  # unit vectors in the new dtype, and averages to go with them
    naive = NaiveVQ(
        ours.codebook.detach(),
        mode="learnable" if ours.learnable_codebook else "ema",
        cosine=ours.use_cosine_sim,
        rotation=ours.rotation_trick,
        decay=0.9,
        weight=0.25,
    )
    return ours, naive


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_hundred_steps_to_float32_rounding(mode: str, masked: bool) -> None:
    ours, naive = both(MODES[mode], torch.float32)
    generator = torch.Generator().manual_seed(6)
    for _ in range(100):
        data = torch.randn(97, DIM, generator=generator)
        upstream = torch.randn(97, DIM, generator=generator)
        mask = torch.rand(97, generator=generator) < 0.7 if masked else None
        grads = []
        outs = []
        for layer in (ours, naive):
            x = data.clone().requires_grad_()
            if layer is ours:
                quantized, indices, loss = ours(x[None], mask=None if mask is None else mask[None])
                quantized, indices = quantized[0], indices[0]
            else:
                quantized, indices, loss = naive(x, mask)
            ((quantized * upstream).sum() + loss).backward()
            grads.append(x.grad)
            outs.append((quantized.detach(), indices, loss.detach()))
        assert torch.equal(outs[0][1], outs[1][1])
        torch.testing.assert_close(outs[0][0], outs[1][0], rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(outs[0][2], outs[1][2], rtol=1e-5, atol=0)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
        if ours.learnable_codebook:
            torch.testing.assert_close(ours._codebook.embed.grad[0], naive.embed.grad, rtol=1e-4, atol=1e-6)
            for codes in (ours._codebook.embed, naive.embed):
                codes.data -= 0.5 * codes.grad
                codes.grad = None
    torch.testing.assert_close(ours.codebook, naive.embed, rtol=1e-4, atol=1e-5)
    if not ours.learnable_codebook:
        torch.testing.assert_close(ours._codebook.cluster_size[0], naive.cluster_size, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours._codebook.embed_avg[0], naive.embed_avg, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_an_autoencoder_trains_alike_in_float64(mode: str) -> None:
    """Here every error feeds back: equal to 1e-9 after a hundred steps, or something is not the same function."""
    quantizers = both(MODES[mode], torch.float64)
    data = torch.randn(100, 41, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    losses = []
    for quantizer in quantizers:
        torch.manual_seed(8)
        model = nn.ModuleList([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)]).double()
        codes = [quantizer.embed] if isinstance(quantizer, NaiveVQ) else list(quantizer.parameters())
        trained = [*model.parameters(), *(c for c in codes if c.requires_grad)]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        seen = []
        for batch in data:
            quantized, _, commitment = quantizer(model[0](batch))
            loss = (model[1](quantized) - batch).square().mean() + commitment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
    torch.testing.assert_close(*(torch.tensor(seen, dtype=torch.float64) for seen in losses), rtol=1e-9, atol=0)
    torch.testing.assert_close(quantizers[0].codebook, quantizers[1].embed, rtol=1e-9, atol=1e-12)
    assert losses[0][-1] < losses[0][0]
