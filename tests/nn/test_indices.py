"""From indices back to codes and outputs."""

from __future__ import annotations

import pytest
import torch
from common import CODES, DIM, pair

HEADS = {
    "one head": {},
    "one head of its own": {"heads": 1, "separate_codebook_per_head": True},
    "shared": {"heads": 2},
    "separate": {"heads": 2, "separate_codebook_per_head": True},
}
LAYOUTS = {
    "last": ({}, (3, 11, DIM)),
    "first": ({"channel_last": False}, (3, DIM, 11)),
    "image": ({"accept_image_fmap": True}, (2, DIM, 5, 3)),
    "square image": ({"accept_image_fmap": True}, (2, DIM, 3, 3)),  # height = width = codebook_dim
    "single": ({}, (23, DIM)),
    "single, first": ({"channel_last": False}, (23, DIM)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("codebook_dim", [None, 3])
def test_output_from_indices_is_the_output(layout: str, heads: str, codebook_dim: int | None) -> None:
    extra, shape = LAYOUTS[layout]
    layer, _ = pair(**HEADS[heads], **extra, codebook_dim=codebook_dim)
    layer.eval()
    x = torch.randn(shape)
    quantized, indices, _ = layer(x)
    output = layer.get_output_from_indices(indices)
    assert output.shape == x.shape
    torch.testing.assert_close(output, quantized, rtol=1e-6, atol=1e-7)
    if x.dim() == 3:
        quantized, indices, _ = layer(x, lens=torch.tensor([0, 11, 4]))
        torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=1e-6, atol=1e-7)


# The peer cannot give codes of a single head of its own, nor of single tokens with a codebook a head.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", ["one head", "shared", "separate"])
def test_codes_are_the_peers(layout: str, heads: str) -> None:
    extra, shape = LAYOUTS[layout]
    heads = "shared" if "single" in layout else heads
    ours, theirs = pair(**HEADS[heads], **extra, codebook_dim=3)
    ours.eval()
    _, indices, _ = ours(torch.randn(shape))
    torch.testing.assert_close(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))


def test_any_leading_shape() -> None:
    ours, theirs = pair()
    for shape in [(), (5,), (2, 3, 4, 5), (0,), (3, 0)]:
        indices = torch.randint(CODES, shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
        assert torch.equal(ours.get_codes_from_indices(indices.int()), theirs.get_codes_from_indices(indices))


@pytest.mark.parametrize("heads", HEADS)
def test_minus_one_is_zero(heads: str) -> None:
    layer, _ = pair(**HEADS[heads], codebook_dim=3)
    indices = torch.full((4, 2) if layer.heads > 1 else (4,), -1)
    assert (layer.get_codes_from_indices(indices) == 0).all()
    output = layer.get_output_from_indices(indices)
    assert output.shape == (4, DIM)
    assert (output == 0).all()


def test_gradient_goes_to_a_learnable_codebook() -> None:
    layer, _ = pair(learnable_codebook=True, ema_update=False)
    layer.get_codes_from_indices(torch.tensor([2, 2, -1, 5])).sum().backward()
    wanted = torch.zeros(CODES)
    wanted[2], wanted[5] = 2, 1
    assert torch.equal(layer._codebook.embed.grad[0, :, 0], wanted)
