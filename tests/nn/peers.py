"""The comparer of our modules with vector-quantize-pytorch's: equal weights, one step each, everything looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import vector_quantize_pytorch as peer
from torch import Tensor, nn

import fastvq


def twins(name: str, *, ours_only: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our class of that name and the peer's, from one seed, with equal state_dicts that load both ways."""
    layers = []
    for package, extra in ((fastvq, ours_only or {}), (peer, {})):
        torch.manual_seed(1)
        layers.append(getattr(package, name)(**options, **extra))
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "values_per_latent" not in key:  # learnt values make the peer's indices wrong
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a return value, by their places in it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(f"{name}.{key}", part)
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from tensors(f"{name}.{number}", part)
    else:
        assert value is None, value


def observe(layer: nn.Module, x: Tensor, *, seed: int = 2, **call: Any) -> dict[str, Tensor]:
    """Outputs, gradients and state of one forward and backward, by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(seed)
    found = dict(tensors("out", layer(x, **call)))
    generator = torch.Generator().manual_seed(3)
    terms = [
        (value * torch.randn(value.shape, generator=generator).to(value)).sum()
        for value in found.values()
        if value.requires_grad
    ]
    if terms:
        torch.stack([term.double() for term in terms]).sum().backward()
    found = {name: value.detach() for name, value in found.items()}
    gradients = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    found |= {f"grad {name}": grad for name, grad in gradients.items() if grad is not None}
    return found | {f"state {name}": value.detach().clone() for name, value in layer.state_dict().items()}


def assert_agree(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    *,
    judge: dict[str, Tensor] | None = None,
    rtol: float = 1e-4,
    dtypes: bool = True,
) -> None:
    """Equal names, shapes and dtypes; integers equal; no gradient is as good as one of zero.

    Numbers may differ by rtol of the largest of the tensor, and, with a judge (the same in float64), by as much as
    theirs differ from the judge's.
    """
    for name in ours.keys() ^ theirs.keys():
        extra = ours.get(name, theirs.get(name))
        assert extra is not None
        assert name.startswith("grad ") and not extra.any(), f"{name} is on one side only"  # noqa: PT018
    for name in ours.keys() & theirs.keys():
        mine, other = ours[name], theirs[name]
        assert mine.shape == other.shape, f"{name}: {mine.shape} for {other.shape}"
        assert mine.dtype == other.dtype or not dtypes, f"{name}: {mine.dtype} for {other.dtype}"
        if not other.is_floating_point() or other.numel() == 0:
            assert torch.equal(mine, other.to(mine.dtype)), name
            continue
        right = other.double() if judge is None else judge[name].double()
        allowed = rtol * max(float(right.abs().max()), 1e-3) + float((other - right).abs().max())
        error = float((mine - right).abs().max())
        assert error <= allowed, f"{name}: off by {error:.3g}, more than {allowed:.3g}"
