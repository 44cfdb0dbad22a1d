"""Operands for tensor cores: centred, scaled by a power of two, rounded, with the rounding measured.

A *group* is a run of `2 * STEPS` codes of which the screen keeps one minimum a row. A tile of the screen holds two
codes, neighbours, of each of COLUMNS / 2 groups; STEPS tiles are a *segment*, and hold those groups whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

FAR = tl.constexpr(1e38)  # the bias of what can never win: padding, and codes that are not finite
SAMPLE = tl.constexpr(4096)  # codes that the frame is taken from: any frame is right, a good one only certifies more


@triton.jit
def power_of_two(largest: tl.tensor) -> Any:
    """The power of two that takes a positive float32 to [2^8, 2^9), at most 2^100; 1 for zero, inf and NaN.

    Float16 then has a factor of 128 above for what was not sampled, and 22 binary orders below at full precision.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    scale = (tl.minimum(262 - exponent, 227) << 23).to(tl.float32, bitcast=True)
    return tl.where((largest > 0) & (exponent < 255), scale, 1.0)


@triton.jit
def reciprocal(power: tl.tensor) -> tl.tensor:
    """1 over a power of two that `power_of_two` gave, exactly."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(values: tl.tensor) -> Any:
    """Elementwise: neither infinite nor NaN."""
    return (values - values) == 0


@triton.jit
def rounded(values: tl.tensor, TYPE: tl.constexpr) -> Any:
    """`values` as a tensor core takes them, and the sums over the last axis of their squares and of what was lost."""
    operand = values.to(TYPE)
    kept = operand.to(values.dtype)
    lost = values - kept
    return operand, tl.sum(kept * kept, axis=1).to(tl.float32), tl.sum(lost * lost, axis=1).to(tl.float32)


@triton.jit
def norms(kept: tl.tensor, lost: tl.tensor, D: tl.constexpr, EXACT: tl.constexpr) -> Any:
    """Upper bounds of the norm of an operand and of its residual, from the sums that `rounded` gives.

    A sum of D squares errs by D 2^-24 of itself at most; the subtraction of the centre by 2^-24 of the result. A square
    below 2^-126 of stored values may be lost; values that were scaled are far from that.
    """
    norm = tl.sqrt(kept + D * 2.0**-126 if EXACT else kept) * (1 + D * 2.0**-22)
    residual = tl.sqrt(lost) * (1 + D * 2.0**-22) + norm * (0.0 if EXACT else 2.0**-22)
    return norm, residual


@triton.jit
def frame_kernel(
    codebook_ptr: tl.tensor,  # (H, K, D)
    frame_ptr: tl.tensor,  # out (H, 2, WIDTH) float32: centre and largest distance from it, by column
    K: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Where the codes lie: the mean and the reach of at most SAMPLE of them, evenly spaced. Grid (columns, heads)."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    stride = tl.cdiv(K, SAMPLE)
    sampled = tl.cdiv(K, stride)
    codes = codebook_ptr + head * K * D + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    low = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    high = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for start in range(0, sampled, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < sampled)[:, None] & (column < D)[None, :]
        values = tl.load(codes + (row.to(tl.int64) * stride * D)[:, None], mask=inside, other=0.0).to(tl.float32)
        inside = inside & is_finite(values)
        total += tl.where(inside, values, 0.0)
        low = tl.minimum(low, tl.where(inside, values, float("inf")))
        high = tl.maximum(high, tl.where(inside, values, float("-inf")))
    if CENTRED:
        centre = tl.sum(total, axis=0) / sampled.to(tl.float32)
        centre = tl.where(is_finite(centre), centre, 0.0)
    else:
        centre = tl.zeros((COLUMNS,), tl.float32)
    reach = tl.maximum(tl.max(high, axis=0) - centre, centre - tl.min(low, axis=0))
    frame = frame_ptr + head * 2 * WIDTH + column
    tl.store(frame, centre, mask=column < WIDTH)
    tl.store(frame + WIDTH, tl.where(reach > 0, reach, 0.0), mask=column < WIDTH)


@triton.jit
def code_scale(frame_ptr: tl.tensor, head: tl.tensor, WIDTH: tl.constexpr, CHUNK: tl.constexpr) -> Any:
    """The power of two that the codes of a head are multiplied by."""
    largest = 0.0
    for start in tl.static_range(0, WIDTH, CHUNK):
        reach = tl.load(frame_ptr + head * 2 * WIDTH + WIDTH + start + tl.arange(0, CHUNK))
        largest = tl.maximum(largest, tl.max(reach, axis=0))
    return power_of_two(largest)


@triton.jit
def pack_codes_kernel(
    codebook_ptr: tl.tensor,  # (H, K, D)
    frame_ptr: tl.tensor,  # (H, 2, WIDTH) float32; not read when RAW
    packed_ptr: tl.tensor,  # out (H, size, WIDTH)
    bias_ptr: tl.tensor,  # out (H, size) float32: half the squared norm, or FAR
    bounds_ptr: tl.tensor,  # out (H, programs, 2) float32, scaled: the largest norm and residual of the program's codes
    K: tl.tensor,
    size: tl.tensor,  # K, padded to whole segments
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    RAW: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Codes in the order of the screen's tiles. Grid (programs, heads)."""
    tl.static_assert(WIDTH % CHUNK == 0)
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    scale = 1.0
    if not RAW:
        scale = code_scale(frame_ptr, head, WIDTH, CHUNK)
    largest_norm = tl.zeros((BLOCK,), tl.float32)
    largest_residual = tl.zeros((BLOCK,), tl.float32)
    for block in range(program, tl.cdiv(size, BLOCK), tl.num_programs(0)):
        place = block * BLOCK + tl.arange(0, BLOCK)
        within = place % (COLUMNS * STEPS)
        slot = (within % COLUMNS) // 2
        code = ((place // (COLUMNS * STEPS)) * (COLUMNS // 2) + slot) * (2 * STEPS)
        code += (within // COLUMNS) * 2 + within % 2
        alive = code < K
        # A code that is not finite is nearest only where none is near; but its dot product may be the largest.
        if EUCLIDEAN:
            for start in tl.static_range(0, WIDTH, CHUNK):
                dims = start + tl.arange(0, CHUNK)
                inside = (code < K)[:, None] & (dims < D)[None, :]
                source = codebook_ptr + (head * K + code.to(tl.int64))[:, None] * D + dims[None, :]
                values = tl.load(source, mask=inside, other=0.0)
                alive = alive & (tl.min(is_finite(values).to(tl.int32), axis=1) > 0)
        kept = tl.zeros((BLOCK,), tl.float32)
        lost = tl.zeros((BLOCK,), tl.float32)
        for start in tl.static_range(0, WIDTH, CHUNK):
            dims = start + tl.arange(0, CHUNK)
            inside = alive[:, None] & (dims < D)[None, :]
            source = codebook_ptr + (head * K + code.to(tl.int64))[:, None] * D + dims[None, :]
            values = tl.load(source, mask=inside, other=0.0)
            if values.dtype != tl.float64:
                values = values.to(tl.float32)
            if not RAW:
                centre = tl.load(frame_ptr + head * 2 * WIDTH + dims)
                values = tl.where(inside, (values - centre[None, :]) * scale, 0.0)
            operand, squares, losses = rounded(values, packed_ptr.dtype.element_ty)
            kept += squares
            lost += losses
            target = tl.multiple_of(packed_ptr + head * size * WIDTH, 16)
            target += place.to(tl.int64)[:, None] * WIDTH + dims[None, :]
            tl.store(target, operand, mask=(place < size)[:, None])
        norm, residual = norms(kept, lost, D, RAW)
        bias = tl.where(alive, 0.5 * kept if EUCLIDEAN else 0.0, FAR)
        tl.store(bias_ptr + head * size + place, bias, mask=place < size)
        largest_norm = tl.maximum(largest_norm, norm, propagate_nan=tl.PropagateNan.ALL)
        largest_residual = tl.maximum(largest_residual, residual, propagate_nan=tl.PropagateNan.ALL)
    bounds = bounds_ptr + (head * tl.num_programs(0) + program) * 2
    # A maximum across lanes skips NaN: what is not finite becomes infinite first.
    tl.store(bounds, tl.max(tl.where(is_finite(largest_norm), largest_norm, float("inf")), axis=0))
    tl.store(bounds + 1, tl.max(tl.where(is_finite(largest_residual), largest_residual, float("inf")), axis=0))


_BLOCK = 16  # codes of a program that packs
_PROGRAMS = 256  # that pack, at most, and leave a bound each


class PackedCodes(NamedTuple):
    """Codebooks as operands, one a head."""

    frame: Tensor  # (H, 2, width) float32
    codes: Tensor  # (H, segments * steps * columns, width)
    bias: Tensor  # (H, segments * steps * columns) float32
    bounds: Tensor  # (H, parts, 2) float32
    segments: int
    parts: int


def pack_codes(
    codebook: Tensor, dtype: torch.dtype, raw: bool, euclidean: bool, width: int, columns: int, steps: int
) -> PackedCodes:
    """Codebooks (H, K, D), dense, as operands of `dtype`: the stored values when `raw`, else moved and scaled."""
    heads, K, D = codebook.shape
    device = codebook.device
    segments = triton.cdiv(K, columns * steps)
    size = segments * columns * steps
    parts = min(_PROGRAMS, triton.cdiv(size, _BLOCK))
    frame = torch.empty((heads, 2, width), dtype=torch.float32, device=device)
    if not raw:
        launch(
            frame_kernel,
            (triton.cdiv(width, 16), heads),
            *[codebook, frame, K],
            D=D,
            WIDTH=width,
            CENTRED=euclidean,
            ROWS=128,
            COLUMNS=16,
            num_warps=4,
            num_stages=1,
        )
    codes = torch.empty((heads, size, width), dtype=dtype, device=device)
    bias = torch.empty((heads, size), dtype=torch.float32, device=device)
    bounds = torch.empty((heads, parts, 2), dtype=torch.float32, device=device)
    launch(
        pack_codes_kernel,
        (parts, heads),
        *[codebook, frame, codes, bias, bounds, K, size],
        D=D,
        WIDTH=width,
        CHUNK=min(width, 64),
        RAW=raw,
        EUCLIDEAN=euclidean,
        COLUMNS=columns,
        STEPS=steps,
        BLOCK=_BLOCK,
        num_warps=4,
        num_stages=1,
    )
    return PackedCodes(frame, codes, bias, bounds, segments, parts)
