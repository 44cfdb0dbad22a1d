"""A residual quantiser: once its codes are found, the sum of them and the losses; and the gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends.reference import working_dtype
from fastvq.backends.rows import gathered

from .code_gradients import code_gradients
from .code_sums import rows_by_code
from .launch import launch
from .pointwise import bits, elements, loss_scale, narrow, tile_for
from .residual_search import residual_search
from .rows import row_offsets, rows_of
from .vector_quantize import loss_kernel

_PROGRAMS = 4096  # at most, of the first stage of the losses; independent of the device, and so is their order


@triton.jit(do_not_specialize=["N", "blocks"])
def gather_stages_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_x: tl.tensor,
    codebooks_ptr: tl.tensor,  # (H, Q, K, D)
    stride_codebooks: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    stride_d: tl.tensor,
    indices_ptr: tl.tensor,  # (H, N, Q)
    quantized_ptr: tl.tensor,  # out (H, N, D)
    sums_ptr: tl.tensor,  # out (Q, H, programs) float64: of squared differences
    N: tl.tensor,
    blocks: tl.tensor,  # of ROWS rows, that a program takes one after the other
    Q: tl.tensor,
    D: tl.constexpr,
    WORK: tl.constexpr,
    STAGES: tl.constexpr,  # Q, to a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sum of the codes of every row, and the first stage of each stage's loss. Grid (programs, H)."""
    head = tl.program_id(1).to(tl.int64)
    squares = tl.zeros((STAGES,), tl.float64)
    for block in range(blocks):
        row = (tl.program_id(0).to(tl.int64) * blocks + block) * ROWS + tl.arange(0, ROWS)
        alive = row < N
        at_row = x_ptr + head * stride_h + row_offsets(row, inner, stride_outer, stride_inner)
        for start in range(0, D, COLUMNS):
            column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
            inside = alive[:, None] & (column < D)
            residual = tl.load(at_row[:, None] + column * stride_x, mask=inside, other=0.0).to(WORK)
            quantized = tl.zeros((ROWS, COLUMNS), WORK)
            for stage in range(Q):
                index = tl.load(indices_ptr + (head * N + row) * Q + stage, mask=alive, other=0)
                at_code = codebooks_ptr + head * stride_codebooks + stage * stride_q + index * stride_k
                code = tl.load(at_code[:, None] + column * stride_d, mask=inside, other=0.0)
                difference = residual.to(tl.float64) - code.to(tl.float64)
                total = tl.sum(tl.sum(difference * difference, axis=1), axis=0)
                squares += tl.where(tl.arange(0, STAGES) == stage, total, 0.0)
                residual = residual - code.to(WORK)
                # The first code is taken, not added to zero, which would lose the sign of a zero.
                quantized = tl.where(stage > 0, quantized + code.to(WORK), code.to(WORK))
            target = quantized_ptr + (head * N + row)[:, None] * D + column
            tl.store(target, narrow(quantized.to(tl.float64), quantized_ptr.dtype.element_ty), mask=inside)
    at = tl.arange(0, STAGES)
    programs = tl.num_programs(0) * tl.num_programs(1)
    parts = sums_ptr + at * programs + head * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts, squares, mask=at < Q)


def residual_quantize(x: Tensor, codebooks: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized (..., D), indices (..., Q), losses (Q,); residuals rounded once a stage."""
    per_head = codebooks.dim() == 4
    codebooks = codebooks.resolve_neg().contiguous()
    indices = residual_search(x, codebooks, metric)
    rows = rows_of(x, per_head)
    codes = codebooks if per_head else codebooks.unsqueeze(0)
    heads, stages, _, D = codes.shape
    work = working_dtype(x, codebooks)
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    losses = torch.empty(stages, dtype=work, device=x.device)
    tile = tile_for(D)
    blocks = max(1, triton.cdiv(rows.length, tile.rows * _PROGRAMS))
    programs = triton.cdiv(rows.length, tile.rows * blocks)
    sums = torch.empty((stages, heads, programs), dtype=torch.float64, device=x.device)
    if sums.numel():
        launch(
            gather_stages_kernel,
            (programs, heads),
            *[rows.tensor, rows.inner, *rows.strides, codes, *codes.stride()],
            *[indices, quantized, sums, rows.length, blocks, stages],
            D=D,
            WORK=tl.float64 if work == torch.float64 else tl.float32,
            STAGES=triton.next_power_of_2(stages),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=8,  # with four some dtypes spill
        )
    launch(
        loss_kernel,
        (stages,),
        *[sums, None, losses, heads * programs, heads * rows.length, bits(1.0)],
        D=D,
        BLOCK=1024,
        num_warps=4,
    )
    return quantized, indices, losses


@triton.jit(do_not_specialize=["N", "all_rows"])
def pull_stages_kernel(
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
    codebooks_ptr: tl.tensor,  # (H, Q, K, D)
    stride_codebooks: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    stride_d: tl.tensor,
    indices_ptr: tl.tensor,  # (H, N, Q)
    grad_losses_ptr: tl.tensor,  # (Q,)
    grad_x_ptr: tl.tensor,  # out (H, N, D)
    N: tl.tensor,
    all_rows: tl.tensor,
    Q: tl.tensor,
    D: tl.constexpr,
    WORK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The gradient to x: what came, and the pull of every stage's loss. Grid (row blocks, column blocks, H)."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    alive = row < N
    inside = alive[:, None] & (column < D)
    at_gradient = gradient_ptr + head * gradient_h + row_offsets(row, gradient_inner, gradient_outer, gradient_step)
    at_row = x_ptr + head * stride_h + row_offsets(row, inner, stride_outer, stride_inner)
    gradient = tl.load(at_gradient[:, None] + column * gradient_d, mask=inside, other=0.0).to(tl.float64)
    residual = tl.load(at_row[:, None] + column * stride_x, mask=inside, other=0.0).to(WORK)
    count = elements(None, all_rows, D)
    for stage in range(Q):
        index = tl.load(indices_ptr + (head * N + row) * Q + stage, mask=alive, other=0)
        at_stage = codebooks_ptr + head * stride_codebooks + stage * stride_q
        at_code = at_stage + (index * stride_k)[:, None] + column * stride_d
        code = tl.load(at_code, mask=inside, other=0.0)
        difference = residual.to(tl.float64) - code.to(tl.float64)
        gradient += difference * loss_scale(grad_losses_ptr + stage, count)
        residual = residual - code.to(WORK)
    target = grad_x_ptr + (head * N + row)[:, None] * D + column
    tl.store(target, narrow(gradient, grad_x_ptr.dtype.element_ty), mask=inside)


def residual_quantize_backward(
    grad_quantized: Tensor,
    grad_losses: Tensor,
    x: Tensor,
    codebooks: Tensor,
    indices: Tensor,
    need_x: bool,
    need_codebooks: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (straight-through and all losses) and to the codebooks (each stage's own loss)."""
    per_head = codebooks.dim() == 4
    codes = codebooks.resolve_neg() if per_head else codebooks.resolve_neg().unsqueeze(0)
    heads, stages, K, D = codes.shape
    work = working_dtype(x, codebooks)
    indices, grad_losses = indices.contiguous(), grad_losses.resolve_neg().contiguous()
    grad_x = torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    grad_codebooks = torch.empty(codebooks.shape if need_codebooks else (0,), dtype=codebooks.dtype, device=x.device)
    if need_x:
        rows, gradients = rows_of(x, per_head), rows_of(grad_quantized, per_head)
        tile = tile_for(D)
        launch(
            pull_stages_kernel,
            (triton.cdiv(rows.length, tile.rows), triton.cdiv(D, tile.columns), heads),
            *[argument for r in (gradients, rows) for argument in (r.tensor, r.inner, *r.strides)],
            *[codes, *codes.stride(), indices, grad_losses, grad_x, rows.length, heads * rows.length, stages],
            D=D,
            WORK=tl.float64 if work == torch.float64 else tl.float32,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=4,
        )
    if need_codebooks:
        rows = gathered(x, per_head)
        residual = torch.empty((heads, rows.length, D), dtype=work, device=x.device)
        by_code = rows_by_code(indices.view(heads, rows.length, stages), None, K, checked=False)
        targets = grad_codebooks.view(codes.shape)
        for q in range(stages):
            rest = residual if q + 1 < stages else None
            stage = by_code.stage(q, stages)
            code_gradients(rows, stage, codes[:, q], grad_losses[q], None, -1.0, targets[:, q], rest)
            rows = rows_of(residual, True)
    return grad_x, grad_codebooks
