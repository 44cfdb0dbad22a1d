"""The gradient of a codebook: the rows of each code less the code, summed as `code_sums` does, never stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .code_sums import Level, RowsByCode, add_up, chunk_of, fetch, keep_sum, sum_tile
from .launch import launch
from .pointwise import as_float64, bits, elements, loss_scale
from .rows import Rows

# What is read a number at a time is not compiled for its alignment: stages would differ in it.
_SCALARS = ["codes_ptr", "stride_codes", "order_ptr", "stride_order", "starts_ptr", "grad_loss_ptr"]


@triton.jit(do_not_specialize=[*_SCALARS, "N", "all_rows", "slots", "factor"])
def sum_differences_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    codes_ptr: tl.tensor,  # (H, N), rows sorted by code
    stride_codes: tl.tensor,
    order_ptr: tl.tensor,  # (H, N)
    stride_order: tl.tensor,
    starts_ptr: tl.tensor,  # (H, K + 1)
    stride_starts: tl.tensor,
    codebook_ptr: tl.tensor,  # (H, K, D)
    stride_codebook: tl.tensor,
    stride_k: tl.tensor,
    stride_d: tl.tensor,
    grad_loss_ptr: tl.tensor,  # ()
    kept_ptr: tl.tensor,  # () int64, rows that the mask keeps, or None
    all_rows: tl.tensor,
    sums_ptr: tl.tensor,  # out (H, K, D)
    stride_sums: tl.tensor,
    chunks_ptr: tl.tensor,  # out (H, slots, D) float64
    rest_ptr: tl.tensor,  # out (H, N, D), may be x itself, or None
    N: tl.tensor,
    K: tl.tensor,
    slots: tl.tensor,
    factor: tl.tensor,  # bits of a float64
    D: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sums of (row - code) * the scale of the loss; row - code to `rest`. Grid (K + windows, column blocks, H)."""
    head = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    code, chunk, start, end, exists = chunk_of(
        codes_ptr + head * stride_codes, starts_ptr + head * stride_starts, K, SIZE
    )
    first = start + chunk * SIZE
    last = tl.where(exists, tl.minimum(first + SIZE, end), first)
    scale = loss_scale(grad_loss_ptr, elements(kept_ptr, all_rows, D))
    at_code = codebook_ptr + head * stride_codebook + code * stride_k + column.to(tl.int64) * stride_d
    centre = tl.load(at_code, mask=inside & (code < K), other=0.0)
    x = x_ptr + head * stride_h + column
    total = tl.zeros((COLUMNS,), tl.float64)
    for place in range(first, last, ROWS):
        order = order_ptr + head * stride_order + place
        rows, values = fetch(x, order, last - place, inside, inner, stride_outer, stride_inner, ROWS)
        for i in tl.static_range(ROWS):
            difference = (values[i].to(tl.float64) - centre.to(tl.float64)) * scale
            total += tl.where(place + i < last, difference, 0.0)
            if rest_ptr is not None:
                rest = values[i].to(rest_ptr.dtype.element_ty) - centre.to(rest_ptr.dtype.element_ty)
                target = rest_ptr + (head * N + rows[i]) * D + column
                tl.store(target, rest, mask=inside & (place + i < last))
    sums, chunks = sums_ptr + head * stride_sums, chunks_ptr + head * slots * D
    keep_sum(total, code, chunk, start, end, exists, column, sums, chunks, as_float64(factor), D, SIZE)


def code_gradients(
    rows: Rows,
    by_code: RowsByCode,
    codebook: Tensor,
    grad_loss: Tensor,
    kept: Tensor | None,
    factor: float,
    gradients: Tensor,
    rest: Tensor | None = None,
) -> None:
    """Gradients (H, K, D) of factor / 2 * grad_loss * mean((c - x)^2); what is left of the rows to `rest` (H, N, D).

    Args:
        rows: x (H, N, D), as `gathered` gives them.
        by_code: its rows by code.
        codebook: (H, K, D).
        grad_loss: (), on the device.
        kept: (), how many rows of all heads the mean runs over; None for all.
        factor: of the sum of (x - c) * 2 grad_loss / elements.
        gradients: written.
        rest: written, float32 or float64, each difference rounded once; may be what `rows` reads.
    """
    tile = sum_tile(rows.dim, rows.tensor.element_size())

    def add_differences(level: Level) -> None:
        launch(
            sum_differences_kernel,
            level.grid,
            *[rows.tensor, rows.inner, *rows.strides[:3]],
            *[argument for t in by_code for argument in (t, t.stride(0))],
            *[codebook, *codebook.stride(), grad_loss, kept, rows.heads * rows.length],
            *[gradients, gradients.stride(0), level.chunks, rest],
            *[rows.length, codebook.shape[1], level.chunks.shape[1], bits(factor)],
            D=rows.dim,
            SIZE=level.size,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )

    add_up(by_code, gradients, factor, add_differences)
