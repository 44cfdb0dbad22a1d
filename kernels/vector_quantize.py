"""Rows replaced by their codes, with the loss; and the gradients, in one pass over the rows and one by code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends.reference import working_dtype
from fastvq.backends.rows import gathered

from .code_gradients import code_gradients
from .code_sums import rows_by_code
from .codes import is_finite
from .launch import launch
from .pointwise import as_float64, bits, elements, kept_rows, loss_scale, mask_bytes, narrow, tile_for
from .rows import row_offsets, rows_of
from .search import search

_PROGRAMS = 4096  # at most, of the first stage of a loss; independent of the device, and so is the order of the sum


@triton.jit(do_not_specialize=["K", "N", "blocks"])
def gather_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_x: tl.tensor,
    codebook_ptr: tl.tensor,  # (H, K, D)
    stride_codebook: tl.tensor,
    stride_k: tl.tensor,
    stride_d: tl.tensor,
    indices_ptr: tl.tensor,  # (H, N)
    mask_ptr: tl.tensor,  # (H, N) uint8, or None
    quantized_ptr: tl.tensor,  # out (H, N, D)
    sums_ptr: tl.tensor,  # out (H, programs) float64: of squared differences
    counts_ptr: tl.tensor,  # in and out (H, K) int64: of finite rows that the mask keeps; or None
    K: tl.tensor,
    N: tl.tensor,
    blocks: tl.tensor,  # of ROWS rows, that a program takes one after the other
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The code of every row, in the dtype of x, the first stage of the loss, and counts by code. Grid (programs, H)."""
    head = tl.program_id(1).to(tl.int64)
    squares = tl.zeros((ROWS, COLUMNS), tl.float64)
    for block in range(blocks):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * ROWS + tl.arange(0, ROWS)
        alive = row < N
        index = tl.load(indices_ptr + head * N + row, mask=alive, other=0)
        counted = alive
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + head * N + row, mask=alive, other=0) != 0
        at_row = x_ptr + head * stride_h + row_offsets(row, inner, stride_outer, stride_inner)
        at_code = codebook_ptr + head * stride_codebook + index * stride_k
        finite = tl.full((ROWS, COLUMNS), 1, tl.int32)
        for start in range(0, D, COLUMNS):
            column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
            inside = alive[:, None] & (column < D)
            x = tl.load(at_row[:, None] + column * stride_x, mask=inside, other=0.0)
            code = tl.load(at_code[:, None] + column * stride_d, mask=inside, other=0.0).to(tl.float64)
            target = quantized_ptr + (head * N + row)[:, None] * D + column
            tl.store(target, narrow(code, quantized_ptr.dtype.element_ty), mask=inside)
            difference = tl.where(counted[:, None], x.to(tl.float64) - code, 0.0)
            squares += difference * difference
            if counts_ptr is not None:
                finite &= is_finite(x if x.dtype == tl.float64 else x.to(tl.float32)).to(tl.int32)
        if counts_ptr is not None:
            # Integers add up alike in any order, so that atomics leave the result what it is.
            counted &= tl.min(finite, axis=1) != 0
            one = tl.full((ROWS,), 1, tl.int64)
            tl.atomic_add(counts_ptr + head * K + index, one, mask=counted, sem="relaxed")
    tl.store(sums_ptr + head * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(squares, axis=1), axis=0))


@triton.jit(do_not_specialize=["parts", "all_rows", "weight_bits"])
def loss_kernel(
    sums_ptr: tl.tensor,  # (losses, parts) float64
    kept_ptr: tl.tensor,  # () int64, or None
    loss_ptr: tl.tensor,  # out (losses,)
    parts: tl.tensor,
    all_rows: tl.tensor,
    weight_bits: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The second stage of the loss: the mean of the squared differences, times its weight. Grid (losses,)."""
    sums_ptr += tl.program_id(0) * parts
    loss_ptr += tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + part, mask=part < parts, other=0.0)
    loss = as_float64(weight_bits) * (tl.sum(total, axis=0) / elements(kept_ptr, all_rows, D))
    tl.store(loss_ptr, narrow(loss, loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "all_rows", "weight_bits"])
def pull_kernel(
    gradient_ptr: tl.tensor,
    gradient_inner: tl.tensor,
    gradient_h: tl.tensor,
    gradient_outer: tl.tensor,
    gradient_step: tl.tensor,
    gradient_d: tl.tensor,
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_x: tl.tensor,
    codebook_ptr: tl.tensor,  # (H, K, D)
    stride_codebook: tl.tensor,
    stride_k: tl.tensor,
    stride_d: tl.tensor,
    indices_ptr: tl.tensor,  # (H, N)
    mask_ptr: tl.tensor,  # (H, N) uint8, or None
    grad_loss_ptr: tl.tensor,  # ()
    kept_ptr: tl.tensor,  # () int64, or None
    grad_x_ptr: tl.tensor,  # out (H, N, D)
    N: tl.tensor,
    all_rows: tl.tensor,
    weight_bits: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradient to x: what came, and the pull of the commitment loss. Grid (row blocks, column blocks, H)."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    alive = row < N
    inside = alive[:, None] & (column < D)
    index = tl.load(indices_ptr + head * N + row, mask=alive, other=0)
    at_gradient = gradient_ptr + head * gradient_h + row_offsets(row, gradient_inner, gradient_outer, gradient_step)
    at_row = x_ptr + head * stride_h + row_offsets(row, inner, stride_outer, stride_inner)
    at_code = codebook_ptr + head * stride_codebook + index * stride_k
    gradient = tl.load(at_gradient[:, None] + column * gradient_d, mask=inside, other=0.0).to(tl.float64)
    x = tl.load(at_row[:, None] + column * stride_x, mask=inside, other=0.0).to(tl.float64)
    code = tl.load(at_code[:, None] + column * stride_d, mask=inside, other=0.0).to(tl.float64)
    difference = x - code
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + head * N + row, mask=alive, other=0) != 0
        difference = tl.where(counted[:, None], difference, 0.0)
    difference *= loss_scale(grad_loss_ptr, elements(kept_ptr, all_rows, D))
    gradient += as_float64(weight_bits) * difference
    target = grad_x_ptr + (head * N + row)[:, None] * D + column
    tl.store(target, narrow(gradient, grad_x_ptr.dtype.element_ty), mask=inside)


def gather(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    weight: float,
    mask: Tensor | None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The codes at the indices in the dtype of x, and weight * mean((x - code)^2) over the rows that the mask keeps.

    Those of them that are finite are added to `counts` ([H,] K), int64.
    """
    per_head = codebook.dim() == 3
    rows = rows_of(x, per_head)
    codes = codebook.resolve_neg() if per_head else codebook.resolve_neg().unsqueeze(0)
    heads, N, D = rows.heads, rows.length, rows.dim
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    loss = torch.empty((), dtype=working_dtype(x, codebook), device=x.device)
    tile = tile_for(D)
    blocks = max(1, triton.cdiv(N, tile.rows * _PROGRAMS))
    programs = triton.cdiv(N, tile.rows * blocks)
    sums = torch.empty((heads, programs), dtype=torch.float64, device=x.device)
    launch(
        gather_kernel,
        (programs, heads),
        *[rows.tensor, rows.inner, *rows.strides, codes, *codes.stride()],
        *[indices, mask_bytes(mask), quantized, sums, counts, codes.shape[1], N, blocks],
        D=D,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=8,
    )
    launch(
        loss_kernel,
        (1,),
        *[sums, kept_rows(mask), loss, heads * programs, heads * N, bits(weight)],
        D=D,
        BLOCK=1024,
        num_warps=4,
    )
    return quantized, loss


def vector_quantize(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D) in the dtype of x, indices (...), and the loss, a scalar."""
    indices, _ = search(x, codebook, metric, False)
    quantized, loss = gather(x, codebook, indices, commitment_weight + codebook_weight, mask)
    return quantized, indices, loss


def vector_quantize_counted(
    x: Tensor, codebook: Tensor, metric: str, commitment_weight: float, codebook_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize`, and how many finite rows that the mask keeps took each code: counts ([H,] K), int64."""
    indices, _ = search(x, codebook, metric, False)
    counts = torch.zeros(codebook.shape[:-1], dtype=torch.int64, device=x.device)
    quantized, loss = gather(x, codebook, indices, commitment_weight + codebook_weight, mask, counts)
    return quantized, indices, loss, counts


def vector_quantize_backward(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    need_x: bool,
    need_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and commitment loss) and to the codebook (codebook loss)."""
    per_head = codebook.dim() == 3
    codes = codebook.resolve_neg() if per_head else codebook.resolve_neg().unsqueeze(0)
    grad_loss = grad_loss.resolve_neg()
    kept = kept_rows(mask)
    grad_x = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    grad_codebook = torch.empty(codebook.shape if need_codebook else (0,), dtype=codebook.dtype, device=x.device)
    if need_x:
        rows, gradients = rows_of(x, per_head), rows_of(grad_quantized, per_head)
        heads, N, D = rows.heads, rows.length, rows.dim
        tile = tile_for(D)
        launch(
            pull_kernel,
            (triton.cdiv(N, tile.rows), triton.cdiv(D, tile.columns), heads),
            *[argument for r in (gradients, rows) for argument in (r.tensor, r.inner, *r.strides)],
            *[codes, *codes.stride(), indices.contiguous(), mask_bytes(mask), grad_loss, kept, grad_x],
            *[N, heads * N, bits(commitment_weight)],
            D=D,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=4,
        )
    if need_codebook:
        rows = gathered(x, per_head)
        flat_mask = None if mask is None else mask.reshape(rows.heads, rows.length)
        by_code = rows_by_code(indices.reshape(rows.heads, rows.length, 1), flat_mask, codes.shape[1], checked=False)
        code_gradients(rows, by_code, codes, grad_loss, kept, -codebook_weight, grad_codebook.view(codes.shape))
    return grad_x, grad_codebook
