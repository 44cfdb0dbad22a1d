"""How many rows chose each code, and their sum: rows sorted by code, then summed run by run, in a fixed order.

A *chunk* is a run of at most CHUNK rows of one code, counted from the code's first. One program adds a chunk row after
row; the sums of CHUNK chunks are added in the same way, and so on until the code is whole. So a sum depends on nothing
but the rows of its code, whatever the grid and the device, and a code that owns all rows still occupies all programs.
Up to CHUNK rows the float64 sum is that of the reference, bit for bit; beyond, its terms are associated by chunks.

Who finds the chunks? The first K programs take the first chunk of each code. Any other chunk starts SIZE rows after
the last one of its code, so a window of SIZE sorted rows holds at most one start of such a chunk, and its code must be
the one at the window's beginning: one more program for each window, and nothing to count or to scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends.reference import working_dtype
from fastvq.backends.rows import gathered

from .launch import launch
from .pointwise import as_float64, bits, mask_bytes, narrow
from .rows import row_offsets

CHUNK = 256
UNROLL = 16  # rows on their way at a time: a sum in row order lives by the loads in flight
_KEYS = ((torch.uint8, 1 << 8), (torch.int16, 1 << 15), (torch.int32, 1 << 31))  # a radix sort takes a pass a byte


class RowsByCode(NamedTuple):
    """The rows of each of S problems (a problem: one head, or one head and stage), sorted by code in row order."""

    codes: Tensor  # (S, N), ascending; K for rows left out
    order: Tensor  # (S, N) int64, the row at each place
    starts: Tensor  # (S, K + 1) int64, the first place of each code

    def stage(self, q: int, stages: int) -> RowsByCode:
        """The problems of one of several stages, where problem = head * stages + stage."""
        return RowsByCode(*(t[q::stages] for t in self))


@triton.jit(do_not_specialize=["N"])
def key_kernel(
    indices_ptr: tl.tensor,  # (H, N, Q) int64
    mask_ptr: tl.tensor,  # (H, N) uint8, or None
    keys_ptr: tl.tensor,  # out (H * Q, N)
    N: tl.tensor,
    K: tl.tensor,
    Q: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The key that each row is sorted by: its code, or K where it is left out. Grid (row blocks, H * Q)."""
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    index = tl.load(indices_ptr + (problem // Q * N + row) * Q + problem % Q, mask=inside, other=-1)
    tl.device_assert(index < K, "indices must be below codebook_size")
    keep = (index >= 0) & (index < K)
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + problem // Q * N + row, mask=inside, other=0) != 0)
    tl.store(keys_ptr + problem * N + row, tl.where(keep, index, K).to(keys_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "steps"])
def starts_kernel(
    codes_ptr: tl.tensor,  # (S, N), ascending
    starts_ptr: tl.tensor,  # out (S, K + 1) int64
    N: tl.tensor,
    K: tl.tensor,
    steps: tl.tensor,  # of a bisection of N + 1 places
    BLOCK: tl.constexpr,
) -> None:
    """The first place of each code by bisection. Grid (code blocks, S)."""
    problem = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + N
    for _ in range(steps):
        middle = (low + high) // 2
        found = tl.load(codes_ptr + problem * N + middle, mask=low < high, other=0)
        below = (low < high) & (found.to(tl.int32) < code)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(starts_ptr + problem * (K + 1) + code, low, mask=code <= K)


@triton.jit
def chunk_of(codes_ptr: tl.tensor, starts_ptr: tl.tensor, K: tl.tensor, SIZE: tl.constexpr) -> Any:
    """The chunk of SIZE rows that this program adds, see above: its code and number, the code's places, and if any."""
    program = tl.program_id(0)
    is_first = program < K
    window = tl.maximum(program - K, 0).to(tl.int64) * SIZE
    at_window = tl.load(codes_ptr + window, mask=program >= K, other=0).to(tl.int64)
    code = tl.where(is_first, program.to(tl.int64), at_window)
    start = tl.load(starts_ptr + code, mask=code < K, other=0)
    end = tl.load(starts_ptr + code + 1, mask=code < K, other=0)
    chunk = tl.where(is_first, 0, (window - start + SIZE - 1) // SIZE)
    exists = is_first | ((code < K) & (chunk > 0) & (start + chunk * SIZE < end))
    return code, chunk, start, end, exists


@triton.jit
def slot_of(start: tl.tensor, chunk: tl.tensor, SIZE: tl.constexpr) -> Any:
    """Where the sum of a chunk is kept: two places for each window, as a window may hold a first chunk and another."""
    return 2 * (start // SIZE + chunk) + 1 - tl.minimum(chunk, 1)


@triton.jit
def fetch(
    x: tl.tensor,  # of the head and the columns
    order: tl.tensor,
    left: tl.tensor,
    inside: tl.tensor,
    inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    ROWS: tl.constexpr,
) -> Any:
    """The next ROWS rows of an order that has `left` more, and their numbers: all on their way before one is used."""
    rows = ()
    values = ()
    for i in tl.static_range(ROWS):
        rows += (tl.load(order + i, mask=i < left, other=0),)  # type: ignore[assignment]
    for i in tl.static_range(ROWS):
        source = x + row_offsets(rows[i], inner, stride_outer, stride_inner)
        values += (tl.load(source, mask=inside & (i < left), other=0.0),)  # type: ignore[assignment]
    return rows, values


@triton.jit
def keep_sum(
    total: tl.tensor,
    code: tl.tensor,
    chunk: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    exists: tl.tensor,
    column: tl.tensor,
    sums_ptr: tl.tensor,
    chunks_ptr: tl.tensor,
    factor: tl.tensor,
    D: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Write the sum of a chunk: times `factor` and rounded where it is the whole code, else for the next level."""
    whole = end - start <= SIZE
    store = (column < D) & exists
    tl.store(sums_ptr + code * D + column, narrow(factor * total, sums_ptr.dtype.element_ty), mask=store & whole)
    tl.store(chunks_ptr + slot_of(start, chunk, SIZE) * D + column, total, mask=store & (end - start > SIZE))


@triton.jit(do_not_specialize=["N", "slots"])
def sum_rows_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    codes_ptr: tl.tensor,  # (H, N)
    order_ptr: tl.tensor,  # (H, N)
    starts_ptr: tl.tensor,  # (H, K + 1)
    counts_ptr: tl.tensor,  # out (H, K)
    sums_ptr: tl.tensor,  # out (H, K, D)
    chunks_ptr: tl.tensor,  # out (H, slots, D) float64
    N: tl.tensor,
    K: tl.tensor,
    slots: tl.tensor,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Counts, and the sums of the first level. Grid (K + windows, column blocks, H)."""
    head = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    code, chunk, start, end, exists = chunk_of(codes_ptr + head * N, starts_ptr + head * (K + 1), K, SIZE)
    first = start + chunk * SIZE
    last = tl.where(exists, tl.minimum(first + SIZE, end), first)
    x = x_ptr + head * stride_h + column
    total = tl.zeros((COLUMNS,), tl.float64)
    for place in range(first, last, ROWS):
        order = order_ptr + head * N + place
        _, values = fetch(x, order, last - place, column < D, inner, stride_outer, stride_inner, ROWS)
        for i in tl.static_range(ROWS):
            total += values[i].to(tl.float64)
    count = (end - start).to(counts_ptr.dtype.element_ty)
    tl.store(counts_ptr + head * K + code, count, mask=(tl.program_id(0) < K) & (tl.program_id(1) == 0))
    sums, chunks = sums_ptr + head * K * D, chunks_ptr + head * slots * D
    keep_sum(total, code, chunk, start, end, exists, column, sums, chunks, 1.0, D, SIZE)


@triton.jit(do_not_specialize=["codes_ptr", "starts_ptr", "stride_codes", "part_slots", "slots", "factor"])
def sum_chunks_kernel(
    codes_ptr: tl.tensor,
    stride_codes: tl.tensor,
    starts_ptr: tl.tensor,
    stride_starts: tl.tensor,
    parts_ptr: tl.tensor,  # (H, part_slots, D) float64, sums of chunks of PART rows
    sums_ptr: tl.tensor,  # out (H, K, D)
    stride_sums: tl.tensor,
    chunks_ptr: tl.tensor,  # out (H, slots, D) float64, sums of chunks of SIZE rows
    K: tl.tensor,
    part_slots: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,  # bits of a float64
    D: tl.constexpr,
    PART: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sums of a level from those of the level below, for codes of more than PART rows. Grid as for that."""
    head = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    code, chunk, start, end, exists = chunk_of(
        codes_ptr + head * stride_codes, starts_ptr + head * stride_starts, K, SIZE
    )
    exists = exists & (end - start > PART)
    first = chunk * (SIZE // PART)
    last = tl.where(exists, tl.minimum(first + SIZE // PART, tl.cdiv(end - start, PART)), first)
    total = tl.zeros((COLUMNS,), tl.float64)
    for part in range(first, last, ROWS):
        values = ()
        for i in tl.static_range(ROWS):
            source = parts_ptr + (head * part_slots + slot_of(start, part + i, PART)) * D + column
            values += (tl.load(source, mask=(column < D) & (part + i < last), other=0.0),)  # type: ignore[assignment]
        for i in tl.static_range(ROWS):
            total += values[i]
    sums, chunks = sums_ptr + head * stride_sums, chunks_ptr + head * slots * D
    keep_sum(total, code, chunk, start, end, exists, column, sums, chunks, as_float64(factor), D, SIZE)


class Level(NamedTuple):
    """Chunks of `size` rows: the grid that adds them, and room for those that are not yet a whole code."""

    size: int
    grid: tuple[int, int, int]
    chunks: Tensor  # (H, slots, D) float64


class SumTile(NamedTuple):
    """A program of a sum: `columns` of the rows of a chunk, `rows` of them in flight."""

    rows: int
    columns: int
    warps: int


def sum_tile(D: int, bytes_each: int) -> SumTile:
    """Columns by D alone, a warp or more; four bytes a thread and row: with more ptxas adds between loads, or spills.

    No column has two threads, of which one could read a row that the other has overwritten with what is left of it.
    Shared memory: at most 4 KiB, a row of 512 float64 numbers that changes its layout.
    """
    columns = min(max(triton.next_power_of_2(D), 32), 512)
    return SumTile(UNROLL, columns, max(1, min(8, columns * min(bytes_each, 4) // 128)))


def rows_by_code(indices: Tensor, mask: Tensor | None, K: int, *, checked: bool) -> RowsByCode:
    """Sort rows by code, indices (H, N, Q) and mask (H, N): negative indices and masked rows are left out.

    An index past the codebook is left out too, unless `checked`: then it ends the kernel with a device assertion, as
    an index out of range does in torch, since raising an exception here would take waiting for the device.
    """
    heads, N, Q = indices.shape
    indices, mask = indices.contiguous(), mask_bytes(mask)
    dtype = next(dtype for dtype, limit in _KEYS if limit > K)
    keys = torch.empty((heads * Q, N), dtype=dtype, device=indices.device)
    options = {"debug": True, "sanitize_overflow": False} if checked else {}
    launch(
        key_kernel, (triton.cdiv(N, 512), heads * Q), indices, mask, keys, N, K, Q, BLOCK=512, num_warps=4, **options
    )
    codes, order = keys.sort(dim=1, stable=True)
    starts = torch.empty((heads * Q, K + 1), dtype=torch.int64, device=indices.device)
    grid = (triton.cdiv(K + 1, 128), heads * Q)
    launch(starts_kernel, grid, codes, starts, N, K, N.bit_length(), BLOCK=128, num_warps=4)
    return RowsByCode(codes, order, starts)


def add_up(by_code: RowsByCode, sums: Tensor, factor: float, add_rows: Callable[[Level], None]) -> None:
    """Sums (H, K, D) = factor * the sum of each code: `add_rows` launches the first level, this the others."""
    heads, N = by_code.codes.shape
    K, D = sums.shape[1:]
    tile = sum_tile(D, 8)

    def level(size: int) -> Level:
        windows = triton.cdiv(N, size)
        chunks = torch.empty((heads, 2 * windows, D), dtype=torch.float64, device=sums.device)
        return Level(size, (K + windows, triton.cdiv(D, tile.columns), heads), chunks)

    below = level(CHUNK)
    add_rows(below)
    while below.size < N:
        above = level(below.size * CHUNK)
        launch(
            sum_chunks_kernel,
            above.grid,
            *[by_code.codes, by_code.codes.stride(0), by_code.starts, by_code.starts.stride(0), below.chunks],
            *[sums, sums.stride(0), above.chunks, K, below.chunks.shape[1], above.chunks.shape[1], bits(factor)],
            D=D,
            PART=below.size,
            SIZE=above.size,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
        below = above


def code_sums(
    x: Tensor, indices: Tensor, codebook_size: int, mask: Tensor | None, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Counts ([H,] K) and sums ([H,] K, D): float64 sums in row order (by chunks), rounded once.

    An index at or past `codebook_size` ends the kernel with a device assertion, and is never written through. N is
    limited to 2^31 - 1 a head by torch.sort.
    """
    rows = gathered(x, per_head)
    heads, N, D = rows.heads, rows.length, rows.dim
    by_code = rows_by_code(
        indices.reshape(heads, N, 1), None if mask is None else mask.reshape(heads, N), codebook_size, checked=True
    )
    counts = torch.empty((heads, codebook_size), dtype=working_dtype(x), device=x.device)
    sums = torch.empty((heads, codebook_size, D), dtype=working_dtype(x), device=x.device)
    tile = sum_tile(D, x.element_size())

    def add_rows(level: Level) -> None:
        launch(
            sum_rows_kernel,
            level.grid,
            *[rows.tensor, rows.inner, *rows.strides[:3], *by_code, counts, sums, level.chunks],
            *[N, codebook_size, level.chunks.shape[1]],
            D=D,
            SIZE=level.size,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )

    add_up(by_code, sums, 1.0, add_rows)
    return (counts, sums) if per_head else (counts[0], sums[0])
