"""The nearest codes of every stage of a residual quantiser in one kernel: the residual never leaves its program.

Each stage is screened and certified as in search.py. The groups that are left are scored from the residual in
registers; a row that stays uncertain at any stage is queued, and `whole_kernel` takes all its stages again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends.reference import working_dtype

from .codes import code_scale, is_finite, norms, pack_codes, power_of_two, reciprocal, rounded
from .launch import Device, device_of, launch
from .rows import row_offsets, rows_of
from .search import (
    LISTED,
    NOBODY,
    Tiles,
    code_bounds,
    groups_within,
    load_rows,
    met,
    score_whole,
    screen_segments,
    search,
    threshold,
    width_of,
)


@triton.jit(do_not_specialize=["N", "K", "Q", "segments", "parts"])
def stages_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_d: tl.tensor,
    codebooks_ptr: tl.tensor,  # (H, Q, K, D)
    frame_ptr: tl.tensor,  # (H * Q, 2, WIDTH) float32
    codes_ptr: tl.tensor,  # (H * Q, segments * STEPS * COLUMNS, WIDTH) float16
    bias_ptr: tl.tensor,  # (H * Q, segments * STEPS * COLUMNS)
    bounds_ptr: tl.tensor,  # (H * Q, parts, 2)
    indices_ptr: tl.tensor,  # out (H, N, Q) int64
    queue_ptr: tl.tensor,  # out (H, N) int64: rows to be taken again
    queued_ptr: tl.tensor,  # in and out (H) int32: how many
    N: tl.tensor,
    K: tl.tensor,
    Q: tl.tensor,
    segments: tl.tensor,
    parts: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    SLACK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """All stages of a block of rows. Grid (row blocks, heads)."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = rows < N
    dims = tl.arange(0, WIDTH)
    inside = alive[:, None] & (dims < D)[None, :]
    source = x_ptr + head * stride_h + row_offsets(rows, inner, stride_outer, stride_inner)
    residual = load_rows(source, alive, 0, stride_d, frame_ptr, D, WIDTH, True)
    uncertain = tl.zeros((ROWS,), tl.int1)
    for stage in range(0, Q):
        book = head * Q + stage
        frame = frame_ptr + book * 2 * WIDTH
        moved = tl.where(inside, residual - tl.load(frame + dims)[None, :], 0.0)
        row_scale = power_of_two(tl.max(tl.abs(moved), axis=1))
        x, kept, lost = rounded(moved * row_scale[:, None], codes_ptr.dtype.element_ty)
        norm, rounding = norms(kept, lost, D, False)
        ratio = code_scale(frame_ptr, book, WIDTH, WIDTH) * reciprocal(row_scale)
        best, second = screen_segments(
            *[x, x, alive, -ratio, codes_ptr, bias_ptr, book * segments, segments],
            *[WIDTH, WIDTH, ROWS, COLUMNS, STEPS, BITS, STAGES],
        )
        code_norm, code_residual = code_bounds(bounds_ptr + book * parts * 2, parts, PARTS)
        packing: tl.constexpr = 2.0 ** (BITS - 23)
        bound = threshold(
            *[tl.min(best, axis=1), norm * ratio, rounding * ratio, code_norm, code_residual],
            *[D, packing, EUCLIDEAN, SLACK],
        )
        group, count, whole = groups_within(best, second, bound, 0, BITS)
        uncertain = uncertain | whole
        count = tl.where(whole, 0, count)

        codebook = codebooks_ptr + book * K * D
        reached = tl.full((ROWS,), float("inf"), tl.float32)  # as in search.py's rescore_kernel
        lowest = tl.full((ROWS,), float("inf"), tl.float32)
        runner_up = tl.full((ROWS,), float("inf"), tl.float32)
        nearest = tl.full((ROWS,), NOBODY, tl.int32)
        last = tl.full((ROWS,), -1, tl.int32)
        for place in range(0, tl.minimum(tl.max(count, axis=0), LISTED)):
            last = tl.min(tl.where(group > last[:, None], group, NOBODY), axis=1)
            listed = alive & (place < count)
            for member in range(0, 2 * STEPS):
                code = tl.where(listed, last, 0) * (2 * STEPS) + member
                valid = listed & (code < K)
                target = codebook + code.to(tl.int64)[:, None] * D + dims[None, :]
                values = tl.load(target, mask=valid[:, None] & (dims < D)[None, :], other=0.0).to(tl.float32)
                if EUCLIDEAN:
                    term = tl.where(inside, residual - values, 0.0)
                    value = tl.sum(term * term, axis=1)
                    size = value
                else:
                    term = residual * values
                    value = -tl.sum(term, axis=1)
                    size = tl.sum(tl.abs(term), axis=1)
                error = size * ((D + 8) * 2.0**-24) + D * 2.0**-120
                certain = is_finite(value + error)
                low = tl.where(valid, tl.where(certain, value - error, float("-inf")), float("inf"))
                high = tl.where(valid & certain, value + error, float("inf"))
                reached, lowest, runner_up, nearest = met(reached, lowest, runner_up, nearest, low, high, code)
        uncertain = uncertain | ((runner_up <= reached) & (lowest < float("inf")))
        nearest = tl.where(nearest == NOBODY, 0, nearest)  # every distance is infinite or NaN, or the row is queued
        tl.store(indices_ptr + (head * N + rows) * Q + stage, nearest.to(tl.int64), mask=alive)
        chosen = codebook + nearest.to(tl.int64)[:, None] * D + dims[None, :]
        residual -= tl.load(chosen, mask=inside, other=0.0).to(tl.float32)
    queued = alive & uncertain
    if tl.max(queued.to(tl.int32), axis=0) > 0:
        position = tl.atomic_add(queued_ptr + head + tl.zeros((ROWS,), tl.int32), 1, mask=queued)
        tl.store(queue_ptr + head * N + position, rows, mask=queued)


_WIDEST = 128  # padded dimensions of a residual that registers hold


def stage_tiles(device: Device, width: int) -> Tiles:
    """Tiles for all stages of a block of rows: short groups where, beside 128 dimensions, registers run out.

    Shared memory: the rows as an operand and a pipeline of code tiles, at most
    2 * rows * width + stages * steps * columns * (2 * width + 4).
    """
    if device.backend == "interpreter":
        return Tiles(rows=16, columns=32, steps=2, warps=4, stages=1)
    steps = 1 if device.arch.startswith("sm_8") and width > 64 else 2
    return Tiles(rows=64, columns=64, steps=steps, warps=8, stages=2)


def residual_search(x: Tensor, codebooks: Tensor, metric: str, slack: float = 1.0) -> Tensor:
    """Indices (..., Q) of x (..., D) or (H, ..., D) in codebooks (Q, K, D) or (H, Q, K, D), dense.

    Rows too wide for registers, and float64, go stage by stage through `search`, with the residual in memory.
    `slack` is for the tests, as in `search`.
    """
    per_head = codebooks.dim() == 4
    rows = rows_of(x, per_head)
    heads, N, D = rows.heads, rows.length, rows.dim
    stages, K = codebooks.shape[-3], codebooks.shape[-2]
    euclidean = metric == "euclidean"
    work = working_dtype(x, codebooks)
    indices = torch.empty((*x.shape[:-1], stages), dtype=torch.int64, device=x.device)
    if N == 0 or heads == 0:
        return indices
    width = width_of(D)
    if width > _WIDEST or work == torch.float64:
        return _stage_by_stage(x.to(work), codebooks, metric, indices, slack)
    device = device_of(x)
    tiles = stage_tiles(device, width)
    packed = pack_codes(codebooks.view(-1, K, D), torch.float16, False, euclidean, width, tiles.columns, tiles.steps)
    queue = torch.empty((heads, N), dtype=torch.int64, device=x.device)
    queued = torch.zeros(heads, dtype=torch.int32, device=x.device)
    where = (rows.tensor, rows.inner, *rows.strides)
    launch(
        stages_kernel,
        (triton.cdiv(N, tiles.rows), heads),
        *[*where, codebooks, packed.frame, packed.codes, packed.bias, packed.bounds, indices, queue, queued],
        *[N, K, stages, packed.segments, packed.parts],
        D=D,
        WIDTH=width,
        EUCLIDEAN=euclidean,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        STEPS=tiles.steps,
        BITS=(packed.segments - 1).bit_length(),
        PARTS=triton.next_power_of_2(packed.parts),
        SLACK=slack,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    score_whole(device, rows, codebooks, euclidean, queue, queued, indices, None, stages)
    return indices


def _stage_by_stage(residual: Tensor, codebooks: Tensor, metric: str, indices: Tensor, slack: float) -> Tensor:
    """One search a stage; between them the chosen codes are subtracted in the working dtype."""
    for stage, codebook in enumerate(codebooks.unbind(-3)):
        nearest, _ = search(residual, codebook, metric, False, slack)
        indices[..., stage] = nearest
        if codebook.dim() == 2:
            chosen = codebook[nearest]
        else:
            heads = torch.arange(len(codebook), device=codebook.device)
            chosen = codebook[heads.view(-1, *[1] * (nearest.dim() - 1)), nearest]
        residual = residual - chosen.to(residual.dtype)
    return indices
