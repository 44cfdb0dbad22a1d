"""Argument checks of the modules: each error names the argument, what came and what is needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def whole(name: str, value: object, least: int) -> None:
    """TypeError unless `value` is an int; ValueError unless it is `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """TypeError unless `value` is a number; ValueError unless it is finite and from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not (math.isfinite(value) and least <= value <= most):
        limits = (
            "finite"
            if least == -math.inf
            else f"from {least:g} to {most:g}"
            if most < math.inf
            else f"at least {least:g}"
        )
        raise ValueError(f"{name} must be {limits}; got {value}")


def tensor(name: str, value: object) -> None:
    """TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def dtype(name: str, value: Tensor, wanted: tuple[torch.dtype, ...]) -> None:
    """TypeError unless the dtype is one of `wanted`."""
    if value.dtype not in wanted:
        raise TypeError(
            f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in wanted)}; got {value.dtype}"
        )


def shape(name: str, value: Tensor, wanted: tuple[int, ...]) -> None:
    """ValueError unless the shape is `wanted`."""
    if tuple(value.shape) != tuple(wanted):
        raise ValueError(f"{name} must have shape {tuple(wanted)}; got {tuple(value.shape)}")


def layout(name: str, value: Tensor, dims: int, channel: int, channels: int, wanted: str) -> None:
    """ValueError unless there are `dims` dimensions, and `channels` in dimension `channel`."""
    if value.dim() != dims or value.shape[channel] != channels:
        raise ValueError(f"{name} must have shape {wanted}, with dim = {channels}; got {tuple(value.shape)}")


def keep_codebooks_dim(value: bool | None, num_codebooks: int) -> bool:
    """What keep_num_codebooks_dim means: None asks whether there are several; ValueError for False when there are."""
    if num_codebooks > 1 and value is not None and not value:
        raise ValueError(f"keep_num_codebooks_dim must be True with num_codebooks = {num_codebooks}; got {value}")
    return num_codebooks > 1 if value is None else value


def token_mask(mask: object, places: tuple[int, ...]) -> Tensor:
    """A bool mask of the tokens at (B, ...), or of them as (B, N), flattened to (B * N,)."""
    tensor("mask", mask)
    assert isinstance(mask, Tensor)
    dtype("mask", mask, (torch.bool,))
    if tuple(mask.shape) not in (tuple(places), (*places[:1], math.prod(places[1:]))):
        raise ValueError(f"mask must have shape {tuple(places)}; got {tuple(mask.shape)}")
    return mask.flatten()
