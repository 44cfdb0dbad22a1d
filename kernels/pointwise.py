"""What the passes over rows and codes share: float64 within, one rounding, tiles of rows."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements: at most 8 a thread, of which the float64 ones take 16 registers an operand


class Tile(NamedTuple):
    """A program's share of a (rows, D) tensor, for four or eight warps."""

    rows: int
    columns: int


def tile_for(D: int) -> Tile:
    """A tile of 1024 elements.

    Shared memory: where tensors lie differently a tile is turned round in it, 1024 * 8 bytes at most, which with
    Triton's padding stays below 10 KiB.
    """
    columns = min(triton.next_power_of_2(D), 128)
    return Tile(_TILE // columns, columns)


def bits(value: float) -> int:
    """A float64 as an integer argument, for Triton passes a Python float in float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def kept_rows(mask: Tensor | None) -> Tensor | None:
    """How many rows a mask lets take part, on its device."""
    return None if mask is None else mask.sum()


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as kernels read it, uint8 and dense."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


@triton.jit
def as_float64(bits: tl.tensor) -> Any:
    """The float64 that the host function `bits` took apart."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def narrow(values: tl.tensor, TYPE: tl.constexpr) -> Any:
    """Float64 values as TYPE, the narrow ones by way of float32, as torch rounds them."""
    if tl.float64 == TYPE:
        return values
    else:
        return values.to(tl.float32).to(TYPE)


@triton.jit
def elements(kept_ptr: tl.tensor, rows: tl.tensor, D: tl.constexpr) -> Any:
    """How many elements the mean of a loss runs over, at least 1; float64. Without a mask `kept_ptr` is None."""
    count = rows.to(tl.int64) if kept_ptr is None else tl.load(kept_ptr)
    return tl.maximum(count * D, 1).to(tl.float64)


@triton.jit
def loss_scale(grad_loss_ptr: tl.tensor, elements: tl.tensor) -> Any:
    """What a difference x - c is multiplied by in the gradient of the mean of its square, float64."""
    return 2 * tl.load(grad_loss_ptr).to(tl.float64) / elements
