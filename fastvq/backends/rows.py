"""Where the rows of a tensor lie: any leading shape, walked in place with a few strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A tensor (H, ..., D) as heads of rows; row n of a head starts at (n // inner) * outer + (n % inner) * step."""

    tensor: Tensor
    heads: int
    length: int  # rows a head
    dim: int
    inner: int  # 1 where one stride will do, which a kernel is compiled for: no division is left
    strides: tuple[int, int, int, int]  # of head (0 for one), n // inner, n % inner, and the element


def finite_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which rows (..., D) are finite, and kept by the mask (...): bool, (...)."""
    finite = torch.linalg.vector_norm(x, torch.inf, dim=-1).isfinite()  # the largest magnitude: exact, in one pass
    return finite if mask is None else finite & mask


def _merge(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """The (size, stride) pairs left when neighbours that lie one after the other are made one."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def rows_of(x: Tensor, per_head: bool) -> Rows:
    """x (..., D), or (H, ..., D) with `per_head`, where it lies; a copy where its leading shape needs three strides."""
    x = x.resolve_neg()
    lead = 1 if per_head else 0
    walk = _merge(tuple(x.shape[lead:-1]), x.stride()[lead:-1])
    if len(walk) > 2:
        x = x.contiguous()
        walk = _merge(tuple(x.shape[lead:-1]), x.stride()[lead:-1])
    (_, outer), (inner, step) = [*walk, *[(1, 0)] * (2 - len(walk))]
    strides = (x.stride(0) if per_head and x.shape[0] > 1 else 0, outer, step, x.stride(-1))
    return Rows(x, x.shape[0] if per_head else 1, x.shape[lead:-1].numel(), x.shape[-1], max(inner, 1), strides)


def gathered(x: Tensor, per_head: bool) -> Rows:
    """The rows of x, to be fetched one by one in any order: a copy if the elements of a row do not lie together.

    In place, each element of such a row would fetch a 32-byte sector of its own: eight times the traffic in float32,
    sixteen in bfloat16, where the copy costs two passes.
    """
    return rows_of(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous(), per_head)
