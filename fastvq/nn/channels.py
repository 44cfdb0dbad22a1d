"""Channels to the last dimension and back; the linear layers between the width of a model and that of its codes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastvq.nn import checks


def channels_last(name: str, x: Tensor, dim: int, second: bool) -> Tensor:
    """(..., dim) from (B, dim, ...) when `second`, else from (..., dim) itself; ValueError where dim is not there."""
    checks.tensor(name, x)
    if x.dim() < 1 + second or x.shape[1 if second else -1] != dim:
        wanted = "(B, dim, ...)" if second else "(..., dim)"
        raise ValueError(f"{name} must have shape {wanted}, with dim = {dim}; got {tuple(x.shape)}")
    return x.movedim(1, -1) if second else x


def channels_back(x: Tensor, second: bool) -> Tensor:
    """What `channels_last` has moved, moved back."""
    return x.movedim(-1, 1) if second else x


def projections(dim: int, width: int, *, needed: bool | None = None, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """Linear layers dim to width and width to dim; identities where they are equal, unless `needed` says so."""
    if dim == width if needed is None else not needed:
        return nn.Identity(), nn.Identity()
    return nn.Linear(dim, width, bias=bias), nn.Linear(width, dim, bias=bias)


def project(layer: nn.Module, codes: Tensor) -> Tensor:
    """`layer` on codes, in the dtype of its weights."""
    projected: Tensor = layer(codes.to(layer.weight.dtype) if isinstance(layer, nn.Linear) else codes)
    return projected


def autocast_off(x: Tensor, off: bool = True) -> AbstractContextManager[object]:
    """A context in which autocast leaves operations on the device of x alone."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if off and torch.amp.is_autocast_available(kind) else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
