"""What the tests of the layer share: equal states, inputs without near ties, one step of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import VectorQuantize as Peer

import fastvq

DIM, CODES = 7, 13


def give_codes(*layers: nn.Module, seed: int = 0) -> None:
    """The same well separated codes to each layer: the peer is inexact in the near ties of its first weights."""
    embed = layers[0]._codebook.embed
    codes = torch.randn(embed.shape, generator=torch.Generator().manual_seed(seed))
    if layers[0].use_cosine_sim:
        codes = functional.normalize(codes, dim=-1)
    for layer in layers:
        layer._codebook.embed.data.copy_(codes)
        layer._codebook.embed_avg.copy_(codes)


def pair(**options: Any) -> tuple[fastvq.VectorQuantize, Peer]:
    """Ours and the peer's layer, with equal weights."""
    options = {"dim": DIM, "codebook_size": CODES} | options
    layers = []
    for build in (fastvq.VectorQuantize, Peer):
        torch.manual_seed(1)
        layers.append(build(**options))
    if not options.get("kmeans_init"):
        give_codes(*layers)
    return layers[0], layers[1]


def step(layer: nn.Module, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Output, loss and gradients of one forward and backward, and the state after it, by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(2)
    quantized, indices, loss = layer(x, **arguments)
    weights = torch.randn(quantized.shape, generator=torch.Generator().manual_seed(3)).to(quantized)
    ((quantized * weights).sum() + loss).backward()
    found = {"quantized": quantized.detach(), "indices": indices, "loss": loss.detach(), "grad x": x.grad}
    found |= {f"grad {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found | {name: value.detach().clone() for name, value in layer.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Equal names, shapes, dtypes, and values up to rounding."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
