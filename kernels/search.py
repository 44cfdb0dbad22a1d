"""The nearest code: screen on tensor cores, certify, re-score; what is not certain is scored whole.

Three kernels a call. `screen_kernel` keeps, for each row, the smallest and the second smallest screened score of every
column of its tiles, and lists the groups of codes that may hold the winner. `rescore_kernel` scores the codes of those
groups, in float32 with an error bound and where that leaves two of them, by the contract in float64.
`whole_kernel` takes the rows that had too many groups from a queue and does the same with every code.
docs/certified-search.md derives the bounds.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune
from .codes import FAR, code_scale, is_finite, norms, pack_codes, power_of_two, reciprocal, rounded
from .launch import Device, device_of, launch
from .rows import Rows, row_offsets, rows_of

LISTED = tl.constexpr(4)  # groups listed a row and split; more make the row whole
NONE = tl.constexpr(-1)
WHOLE = tl.constexpr(-2)
NOBODY = tl.constexpr(2**31 - 1)
UNROLL = tl.constexpr(4)  # dimensions that the contract loads at a time: their sum is in order, and waits for each


@triton.jit
def threshold(
    best: tl.tensor,
    norm: tl.tensor,
    residual: tl.tensor,
    code_norm: tl.tensor,
    code_residual: tl.tensor,
    D: tl.constexpr,
    PACKING: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    SLACK: tl.constexpr,
) -> Any:
    """The screened score above which no code can win, given the smallest; all lengths in units of the codes' scale.

    docs/certified-search.md, "Tensor cores", step by step with the same names.
    """
    eta = (1.25 * D + 10) * 2.0**-23 * norm * code_norm + 2.0**-120 * D
    canonical = D * 2.0**-49 * (norm + residual + code_norm + code_residual)
    canonical *= norm + residual + code_norm + code_residual
    if EUCLIDEAN:
        eta += (D + 4) * 2.0**-25 * code_norm * code_norm
        delta = residual + code_residual
        squared = norm * norm + 2 * (best + eta + PACKING * tl.abs(best))
        squared += 2.0**-21 * (norm * norm + 2 * tl.abs(best))
        reach = tl.sqrt(tl.maximum(squared, 0.0))
        by_distance = 2 * delta * (reach + delta)
        by_score = (code_norm + norm + residual) * code_residual + residual * code_norm
        by_score = 2 * by_score + code_residual * code_residual
        width = tl.minimum(by_distance, by_score)
    else:
        width = 2 * (norm * code_residual + residual * (code_norm + code_residual))
    width = SLACK * (width + canonical + 2 * eta + 2 * PACKING * tl.abs(best))
    return best + width * (1 + 2.0**-10) + 2.0**-21 * tl.abs(best)


@triton.jit
def pack(scores: tl.tensor, segment: tl.tensor, BITS: tl.constexpr) -> Any:
    """float32 scores with the segment's number in their last BITS bits: at most 2^(BITS - 23) of a score is lost."""
    return ((scores.to(tl.int32, bitcast=True) & (-(1 << BITS))) | segment).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(
    source: tl.tensor,
    alive: tl.tensor,
    start: tl.tensor,
    stride_d: tl.tensor,
    frame_ptr: tl.tensor,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    RAW: tl.constexpr,
) -> Any:
    """Dimensions start .. start + CHUNK of rows, float32 (float64 if they are), less the centre unless RAW."""
    dims = start + tl.arange(0, CHUNK)
    inside = alive[:, None] & (dims < D)[None, :]
    values = tl.load(source[:, None] + (dims.to(tl.int64) * stride_d)[None, :], mask=inside, other=0.0)
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    if not RAW:
        values = tl.where(inside, values - tl.load(frame_ptr + dims)[None, :], 0.0)
    return values


@triton.jit
def groups_within(best: tl.tensor, second: tl.tensor, bound: tl.tensor, first: tl.tensor, BITS: tl.constexpr) -> Any:
    """The groups (rows, slots) whose minimum is at most the bound, NOBODY elsewhere; and which rows need all codes."""
    slots: tl.constexpr = best.shape[1]
    segment = best.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    group = (first + segment) * slots + tl.arange(0, slots)[None, :]
    # Not `best <= bound`: a bound that is NaN must let everything in.
    group = tl.where(best > bound[:, None], NOBODY, group)
    count = tl.sum((group != NOBODY).to(tl.int32), axis=1)
    hidden = tl.max((~(second > bound[:, None])).to(tl.int32), axis=1)
    return group, count, (hidden > 0) | (count > LISTED)


@triton.jit
def list_groups(
    listed_ptr: tl.tensor,  # out (LISTED, N) int32 of this head and split
    N: tl.tensor,
    rows: tl.tensor,
    alive: tl.tensor,
    best: tl.tensor,
    second: tl.tensor,
    bound: tl.tensor,
    first_segment: tl.tensor,
    BITS: tl.constexpr,
) -> None:
    """Write the groups whose minimum is at most the bound: NONE fills up, WHOLE in the first place means too many."""
    group, count, whole = groups_within(best, second, bound, first_segment, BITS)
    last = tl.min(group, axis=1)
    target = listed_ptr + rows
    tl.store(target, tl.where(whole, WHOLE, tl.where(count > 0, last, NONE)), mask=alive)
    more = tl.max(tl.where(alive, count, 0), axis=0) > 1
    for place in tl.static_range(1, LISTED):
        found = tl.full(last.shape, NONE, tl.int32)
        if more:
            last = tl.min(tl.where(group > last[:, None], group, NOBODY), axis=1)
            found = tl.where(count > place, last, NONE)
        target += N  # not place * N, which may pass 2^31
        tl.store(target, found, mask=alive)


@triton.jit(do_not_specialize=["N"])
def round_rows_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_d: tl.tensor,
    frame_ptr: tl.tensor,  # (H, 2, WIDTH) float32; not read when RAW
    rounded_ptr: tl.tensor,  # out (H, N, WIDTH)
    figures_ptr: tl.tensor,  # out (H, N, 3) float32: scale, norm and residual (scaled)
    N: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    RAW: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Rows as operands, for the widths at which the screen cannot round them itself. Grid (row blocks, heads)."""
    tl.static_assert(WIDTH % CHUNK == 0)  # else a row's last chunk is written over the next row
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = rows < N
    source = x_ptr + head * stride_h + row_offsets(rows, inner, stride_outer, stride_inner)
    frame = frame_ptr + head * 2 * WIDTH
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if not RAW:
        largest = tl.zeros((ROWS,), tl.float32)
        for start in range(0, WIDTH, CHUNK):
            values = load_rows(source, alive, start, stride_d, frame, D, CHUNK, RAW)
            largest = tl.maximum(largest, tl.max(tl.abs(values), axis=1).to(tl.float32))
        scale = power_of_two(largest)
    kept = tl.zeros((ROWS,), tl.float32)
    lost = tl.zeros((ROWS,), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        values = load_rows(source, alive, start, stride_d, frame, D, CHUNK, RAW) * scale[:, None]
        operand, squares, losses = rounded(values, rounded_ptr.dtype.element_ty)
        kept += squares
        lost += losses
        target = (
            tl.multiple_of(rounded_ptr + head * N * WIDTH, 16)
            + rows[:, None] * WIDTH
            + (start + tl.arange(0, CHUNK))[None, :]
        )
        tl.store(target, operand, mask=alive[:, None])
    norm, residual = norms(kept, lost, D, RAW)
    figures = figures_ptr + (head * N + rows) * 3
    tl.store(figures, scale, mask=alive)
    tl.store(figures + 1, norm, mask=alive)
    tl.store(figures + 2, residual, mask=alive)


@triton.jit
def pair_minima(
    x: tl.tensor,
    rounded_rows: tl.tensor,
    codes: tl.tensor,
    bias: tl.tensor,
    factor: tl.tensor,
    alive: tl.tensor,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
) -> Any:
    """The smaller screened score of each pair of codes of one tile, (rows, SLOTS)."""
    dims = tl.arange(0, CHUNK)
    bias = tl.load(bias)
    if CHUNK == WIDTH:
        dots = tl.dot(x, tl.load(codes + dims[None, :]).T)
    else:
        dots = tl.zeros((factor.shape[0], bias.shape[0]), tl.float32)
        for start in range(0, WIDTH, CHUNK):
            chunk = tl.load(rounded_rows[:, None] + (start + dims)[None, :], mask=alive[:, None], other=0.0)
            dots = tl.dot(chunk, tl.load(codes + (start + dims)[None, :]).T, dots)
    scores = tl.fma(dots, tl.broadcast_to(factor[:, None], dots.shape), tl.broadcast_to(bias[None, :], dots.shape))
    one, other = tl.split(tl.reshape(scores, (scores.shape[0], SLOTS, 2)))
    return tl.minimum(one, other)


@triton.jit
def screen_segments(
    x: tl.tensor,
    rounded_rows: tl.tensor,
    alive: tl.tensor,
    factor: tl.tensor,
    codes_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    STAGES: tl.constexpr,
) -> Any:
    """The smallest and the second smallest packed group minimum of each column, over `count` segments from `first`."""
    slots: tl.constexpr = COLUMNS // 2
    segment_size: tl.constexpr = COLUMNS * STEPS
    places = tl.arange(0, COLUMNS)
    start = first * segment_size
    # What the host allocated starts on a boundary, and so does every row of it.
    codes = tl.multiple_of(codes_ptr + start * WIDTH, 16) + places[:, None] * WIDTH
    bias = tl.multiple_of(bias_ptr + start, 16) + places
    best = tl.full((ROWS, slots), FAR, tl.float32)
    second = tl.full((ROWS, slots), FAR, tl.float32)
    for segment in tl.range(0, count, num_stages=STAGES):
        smallest = pair_minima(x, rounded_rows, codes, bias, factor, alive, WIDTH, CHUNK, slots)
        for step in tl.static_range(1, STEPS):
            tile = codes + step * COLUMNS * WIDTH
            more = pair_minima(x, rounded_rows, tile, bias + step * COLUMNS, factor, alive, WIDTH, CHUNK, slots)
            smallest = tl.minimum(smallest, more)
        packed = pack(smallest, segment, BITS)
        second = tl.minimum(second, tl.maximum(best, packed))
        best = tl.minimum(best, packed)
        codes += segment_size * WIDTH
        bias += segment_size
    return best, second


@triton.jit
def code_bounds(bounds_ptr: tl.tensor, parts: tl.tensor, PARTS: tl.constexpr) -> Any:
    """The largest norm and the largest residual of a codebook's operands, scaled."""
    part = tl.arange(0, PARTS)
    norm = tl.max(tl.load(bounds_ptr + part * 2, mask=part < parts, other=0.0), axis=0)
    residual = tl.max(tl.load(bounds_ptr + part * 2 + 1, mask=part < parts, other=0.0), axis=0)
    return norm, residual


@triton.jit(do_not_specialize=["N", "segments", "parts"])
def screen_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_d: tl.tensor,
    rounded_ptr: tl.tensor,  # (H, N, WIDTH) and
    figures_ptr: tl.tensor,  # (H, N, 3), from round_rows_kernel; not read unless ROUNDED
    frame_ptr: tl.tensor,  # (H, 2, WIDTH) float32; not read when RAW
    codes_ptr: tl.tensor,  # (H, segments * STEPS * COLUMNS, WIDTH)
    bias_ptr: tl.tensor,  # (H, segments * STEPS * COLUMNS)
    bounds_ptr: tl.tensor,  # (H, parts, 2)
    listed_ptr: tl.tensor,  # out (H, splits, LISTED, N) int32
    queued_ptr: tl.tensor,  # out (H) int32: set to 0
    N: tl.tensor,
    segments: tl.tensor,
    parts: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUNDED: tl.constexpr,
    RAW: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    SLACK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Screen all codes for a block of rows, and list the groups that may hold the winner.

    Grid (row blocks, splits, heads): a split screens every splits-th share of the segments. In the loop over them
    nothing crosses lanes: every column of the tile keeps its two smallest group minima, with the segment's number in
    their last bits.
    """
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = rows < N
    scale = 1.0
    if not RAW:
        scale = code_scale(frame_ptr, head, WIDTH, CHUNK)
    rounded_rows = tl.multiple_of(rounded_ptr + head * N * WIDTH, 16) + rows * WIDTH
    if ROUNDED:
        figures = figures_ptr + (head * N + rows) * 3
        row_scale = tl.load(figures, mask=alive, other=1.0)
        norm = tl.load(figures + 1, mask=alive, other=0.0)
        residual = tl.load(figures + 2, mask=alive, other=0.0)
        if CHUNK == WIDTH:
            x = tl.load(rounded_rows[:, None] + tl.arange(0, WIDTH)[None, :], mask=alive[:, None], other=0.0)
        else:
            x = 0.0
    else:
        source = x_ptr + head * stride_h + row_offsets(rows, inner, stride_outer, stride_inner)
        values = load_rows(source, alive, 0, stride_d, frame_ptr + head * 2 * WIDTH, D, CHUNK, RAW)
        row_scale = tl.full((ROWS,), 1.0, tl.float32)
        if not RAW:
            row_scale = power_of_two(tl.max(tl.abs(values), axis=1).to(tl.float32))
        x, kept, lost = rounded(values * row_scale[:, None], codes_ptr.dtype.element_ty)
        norm, residual = norms(kept, lost, D, RAW)
    ratio = scale * reciprocal(row_scale)

    share = tl.cdiv(segments, tl.num_programs(1))
    first = split * share
    count = tl.minimum(segments - first, share)
    best, second = screen_segments(
        *[x, rounded_rows, alive, -ratio, codes_ptr, bias_ptr, head * segments + first, count],
        *[WIDTH, CHUNK, ROWS, COLUMNS, STEPS, BITS, STAGES],
    )

    code_norm, code_residual = code_bounds(bounds_ptr + head * parts * 2, parts, PARTS)
    packing: tl.constexpr = 2.0 ** (BITS - 23)
    bound = threshold(
        *[tl.min(best, axis=1), norm * ratio, residual * ratio, code_norm, code_residual],
        *[D, packing, EUCLIDEAN, SLACK],
    )
    listed = listed_ptr + (head * tl.num_programs(1) + split) * LISTED * N
    list_groups(listed, N, rows, alive, best, second, bound, first, BITS)
    if (tl.program_id(0) == 0) & (split == 0):
        tl.store(queued_ptr + head, 0)


@triton.jit
def interval(
    x: tl.tensor,
    alive: tl.tensor,
    stride_d: tl.tensor,
    codes: tl.tensor,
    valid: tl.tensor,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOUBLE: tl.constexpr,
) -> Any:
    """What each score (rows, codes) lies between: a sum in any order, and what it can be off by."""
    work: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    unit: tl.constexpr = 2.0**-53 if DOUBLE else 2.0**-24
    value = tl.zeros(valid.shape, work)
    size = tl.zeros(valid.shape, work)
    for start in range(0, D, CHUNK):
        dims = start + tl.arange(0, CHUNK)
        inside = (dims < D)[None, None, :]
        of_x = x[:, None, None] + (dims.to(tl.int64) * stride_d)[None, None, :]
        a = tl.load(of_x, mask=alive[:, None, None] & inside, other=0.0)
        b = tl.load(codes[:, :, None] + dims[None, None, :], mask=valid[:, :, None] & inside, other=0.0)
        if EUCLIDEAN:
            term = a.to(work) - b.to(work)
            value += tl.sum(term * term, axis=2)
        else:
            term = a.to(work) * b.to(work)
            value -= tl.sum(term, axis=2)
            size += tl.sum(tl.abs(term), axis=2)
    if EUCLIDEAN:
        size = value
    error = size * ((D + 8) * unit) + D * 2.0**-120
    certain = is_finite(value + error)
    low = tl.where(certain, value - error, float("-inf"))
    high = tl.where(certain, value + error, float("inf"))
    return tl.where(valid, low, float("inf")), tl.where(valid, high, float("inf"))


@triton.jit
def one_term(score: tl.tensor, a: tl.tensor, b: tl.tensor, EUCLIDEAN: tl.constexpr) -> Any:
    """A squared distance or a dot product with one dimension more; float64, each operation rounded on its own."""
    if EUCLIDEAN:
        a -= b
        b = a
    return score + a * b


@triton.jit
def canonical(
    x: tl.tensor,
    alive: tl.tensor,
    stride_d: tl.tensor,
    codes: tl.tensor,
    valid: tl.tensor,
    D: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
) -> Any:
    """The contract's squared distance or dot product, dimension by dimension.

    `x` with `alive` and `codes` with `valid` are pointers of shapes that broadcast together.
    """
    score = (alive & valid).to(tl.float64) * 0.0
    for i in tl.range(0, D, loop_unroll_factor=UNROLL):
        a = tl.load(x + i * stride_d, mask=alive, other=0.0).to(tl.float64)
        b = tl.load(codes + i, mask=valid, other=0.0).to(tl.float64)
        score = one_term(score, a, b, EUCLIDEAN)
    return score


@triton.jit
def ranked(score: tl.tensor, valid: tl.tensor, EUCLIDEAN: tl.constexpr) -> Any:
    """Canonical scores as they are minimised: NaN counts as infinite, and so does what is not there."""
    if not EUCLIDEAN:
        score = -score
    return tl.where(valid & (tl.abs(score) >= 0), score, float("inf"))


@triton.jit
def nobody_met(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOUBLE: tl.constexpr) -> Any:
    """Where places (rows, columns) stand before any code: what their winner reaches at most, the lowest lower end of
    an interval, the next, and whose the lowest is."""
    nothing = tl.full((ROWS, COLUMNS), float("inf"), tl.float64 if DOUBLE else tl.float32)
    return nothing, nothing, nothing, tl.full((ROWS, COLUMNS), NOBODY, tl.int32)


@triton.jit
def met(
    reached: tl.tensor,
    lowest: tl.tensor,
    runner_up: tl.tensor,
    nearest: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    code: tl.tensor,
) -> Any:
    """Where every place stands with one code more, of which the interval is known."""
    nearest = tl.where(low < lowest, code, nearest)
    runner_up = tl.minimum(runner_up, tl.maximum(lowest, low))
    return tl.minimum(reached, high), tl.minimum(lowest, low), runner_up, nearest


@triton.jit
def standing(reached: tl.tensor, lowest: tl.tensor, runner_up: tl.tensor, nearest: tl.tensor) -> Any:
    """What a row knows from its places: an upper bound of the least score, who may have it, and whether others may."""
    least = tl.min(lowest, axis=1)
    whose = tl.min(tl.where(lowest == least[:, None], nearest, NOBODY), axis=1)
    others = tl.where(nearest == whose[:, None], runner_up, lowest)
    reached = tl.min(reached, axis=1)
    return reached, whose, (tl.min(others, axis=1) <= reached) & (whose != NOBODY)


@triton.jit
def met_exactly(winning: tl.tensor, winner: tl.tensor, score: tl.tensor, code: tl.tensor) -> Any:
    """The winner of every place and its score with one code more, a later one than all before."""
    return tl.minimum(winning, score), tl.where(score < winning, code, winner)


@triton.jit
def first_least(score: tl.tensor, code: tl.tensor) -> Any:
    """The code of each row that has the smallest score, the first of equals; NOBODY where all are infinite."""
    least = tl.min(score, axis=1)[:, None]
    return tl.min(tl.where((score == least) & (least < float("inf")), code, NOBODY), axis=1)


@triton.jit(do_not_specialize=["N", "splits"])
def rescore_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_d: tl.tensor,
    codebook_ptr: tl.tensor,  # (H, K, D)
    listed_ptr: tl.tensor,  # (H, splits, LISTED, N) int32
    queue_ptr: tl.tensor,  # out (H, N) int64: rows to be scored whole
    queued_ptr: tl.tensor,  # in and out (H) int32: how many
    indices_ptr: tl.tensor,  # out (H, N) int64
    distances_ptr: tl.tensor,  # out (H, N); not written unless DISTANCES
    N: tl.tensor,
    K: tl.tensor,
    splits: tl.tensor,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOUBLE: tl.constexpr,
    DISTANCES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The nearest code of every row that has its groups listed. Grid (row blocks, heads)."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = rows < N
    x = x_ptr + head * stride_h + row_offsets(rows, inner, stride_outer, stride_inner)
    codebook = codebook_ptr + head * K * D
    listed = listed_ptr + head * splits * LISTED * N + rows
    member = tl.arange(0, GROUP)[None, :]

    reached, lowest, runner_up, nearest = nobody_met(ROWS, GROUP, DOUBLE)
    whole = tl.zeros((ROWS,), tl.int1)
    place = listed
    for _ in range(0, splits * LISTED):
        group = tl.load(place, mask=alive, other=NONE)
        place += N
        whole = whole | (group == WHOLE)
        if tl.max(group, axis=0) >= 0:
            code = group[:, None] * GROUP + member
            valid = (group >= 0)[:, None] & (code < K)
            codes = codebook + code.to(tl.int64) * D
            low, high = interval(x, alive, stride_d, codes, valid, D, CHUNK, EUCLIDEAN, DOUBLE)
            reached, lowest, runner_up, nearest = met(reached, lowest, runner_up, nearest, low, high, code)
    reached, nearest, tied = standing(reached, lowest, runner_up, nearest)

    # Two codes within the error of float32: the contract decides among all that are listed.
    tied = tied & ~whole
    if tl.max(tied.to(tl.int32), axis=0) > 0:
        winning = tl.full((ROWS, GROUP), float("inf"), tl.float64)
        winner = tl.full((ROWS, GROUP), NOBODY, tl.int32)
        place = listed
        for _ in range(0, splits * LISTED):
            group = tl.load(place, mask=alive & tied, other=NONE)
            place += N
            if tl.max(group, axis=0) >= 0:
                code = group[:, None] * GROUP + member
                valid = (group >= 0)[:, None] & (code < K)
                codes = codebook + code.to(tl.int64) * D
                score = canonical(x[:, None], alive[:, None], stride_d, codes, valid, D, EUCLIDEAN)
                score = ranked(score, valid, EUCLIDEAN)
                winning, winner = met_exactly(winning, winner, score, code)
        nearest = tl.where(tied, first_least(winning, winner), nearest)

    nearest = tl.where(nearest == NOBODY, 0, nearest)  # every distance is infinite or NaN
    found = alive & ~whole
    tl.store(indices_ptr + head * N + rows, nearest.to(tl.int64), mask=found)
    if DISTANCES:
        distance = canonical(x, found, stride_d, codebook + nearest.to(tl.int64) * D, found, D, EUCLIDEAN)
        tl.store(distances_ptr + head * N + rows, distance, mask=found)
    unfound = alive & whole
    if tl.max(unfound.to(tl.int32), axis=0) > 0:
        position = tl.atomic_add(queued_ptr + head + tl.zeros((ROWS,), tl.int32), 1, mask=unfound)
        tl.store(queue_ptr + head * N + position, rows, mask=unfound)


@triton.jit
def nearest_code(
    x: tl.tensor,  # (1) pointer to a row, dense
    codebook: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    DOUBLE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> Any:
    """The nearest of the codes from `first` to before `last`, (1), NOBODY where every distance is infinite or NaN.

    Nothing crosses warps while the codes are scanned: every column of the tile has its own standing.
    """
    there = tl.full((1,), 1, tl.int1)
    reached, lowest, runner_up, nearest = nobody_met(1, COLUMNS, DOUBLE)
    for start in range(first, last, COLUMNS):
        code = start + tl.arange(0, COLUMNS)[None, :]
        codes = codebook + code.to(tl.int64) * D
        low, high = interval(x, there, 1, codes, code < last, D, CHUNK, EUCLIDEAN, DOUBLE)
        reached, lowest, runner_up, nearest = met(reached, lowest, runner_up, nearest, low, high, code)
    reached, nearest, tied = standing(reached, lowest, runner_up, nearest)
    if tl.max(tied.to(tl.int32), axis=0) > 0:
        winning = tl.full((1, COLUMNS), float("inf"), tl.float64)
        winner = tl.full((1, COLUMNS), NOBODY, tl.int32)
        for start in range(first, last, COLUMNS):
            code = start + tl.arange(0, COLUMNS)[None, :]
            codes = codebook + code.to(tl.int64) * D
            low, _ = interval(x, there, 1, codes, code < last, D, CHUNK, EUCLIDEAN, DOUBLE)
            close = (code < last) & (low <= reached[:, None])
            if tl.max(tl.max(close.to(tl.int32), axis=1), axis=0) > 0:
                score = canonical(x[:, None], there[:, None], 1, codes, close, D, EUCLIDEAN)
                score = ranked(score, close, EUCLIDEAN)
                winning, winner = met_exactly(winning, winner, score, code)
        nearest = first_least(winning, winner)
    return nearest


@triton.jit(do_not_specialize=["N", "K", "Q"])
def whole_kernel(
    x_ptr: tl.tensor,
    inner: tl.tensor,
    stride_h: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    stride_d: tl.tensor,
    codebooks_ptr: tl.tensor,  # (H, Q, K, D)
    queue_ptr: tl.tensor,  # (H, N) int64
    queued_ptr: tl.tensor,  # (H) int32
    residuals_ptr: tl.tensor,  # scratch (H, programs, D), of the type that is computed in, and of all programs:
    winners_ptr: tl.tensor,  # (H, programs) int32: the nearest of its part of the codes
    scores_ptr: tl.tensor,  # (H, programs) float64
    arrived_ptr: tl.tensor,  # (H, programs) int32, zeros: how many parts of a row are done
    indices_ptr: tl.tensor,  # out (H, N, Q) int64
    distances_ptr: tl.tensor,  # out (H, N, Q); not written unless DISTANCES
    N: tl.tensor,
    K: tl.tensor,
    Q: tl.tensor,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGED: tl.constexpr,  # whether Q is more than 1
    EUCLIDEAN: tl.constexpr,
    DOUBLE: tl.constexpr,
    DISTANCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Queued rows against every code of every stage, a row at a time. Grid (programs, heads).

    Of few rows the codes are shared out in parts, and the last program to be done with one takes the best of them.
    What earlier stages left of its row is each program's own, in memory.
    """
    head = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(0)
    queued = tl.load(queued_ptr + head)
    tiles = tl.cdiv(K, COLUMNS)
    parts = 1
    if not STAGED:
        parts = tl.maximum(tl.minimum(tl.minimum(programs // tl.maximum(queued, 1), tiles), PARTS), 1)
    share = tl.cdiv(tiles, parts) * COLUMNS
    residual = residuals_ptr + (head * programs + tl.program_id(0)) * D
    there = tl.full((1,), 1, tl.int1)
    for item in range(tl.program_id(0), queued * parts, programs):
        entry = item // parts
        row = tl.load(queue_ptr + head * N + entry)
        x = x_ptr + head * stride_h + row_offsets(row, inner, stride_outer, stride_inner)
        tl.debug_barrier()  # the row before has been read
        for start in range(0, D, CHUNK):
            dims = start + tl.arange(0, CHUNK)
            values = tl.load(x + dims.to(tl.int64) * stride_d, mask=dims < D)
            tl.store(residual + dims, values.to(residuals_ptr.dtype.element_ty), mask=dims < D)
        first = (item % parts) * share
        for stage in range(0, Q):
            tl.debug_barrier()  # what other threads have written is read
            codebook = codebooks_ptr + (head * Q + stage) * K * D
            left = residual + tl.zeros((1,), tl.int32)
            last = tl.minimum(first + share, K)
            nearest = nearest_code(left, codebook, first, last, D, CHUNK, EUCLIDEAN, DOUBLE, COLUMNS)
            done = parts == 1
            if parts > 1:
                found = nearest != NOBODY
                score = canonical(left, there, 1, codebook + nearest.to(tl.int64) * D, found, D, EUCLIDEAN)
                own = head * programs + item + tl.zeros((1,), tl.int32)
                tl.store(winners_ptr + own, nearest)
                tl.store(scores_ptr + own, ranked(score, found, EUCLIDEAN))
                tl.debug_barrier()  # both are written before this part is told of
                done = tl.atomic_add(arrived_ptr + head * programs + entry, 1) == parts - 1
                if done:
                    part = tl.arange(0, PARTS)[None, :]
                    all_parts = head * programs + entry * parts + part
                    codes = tl.load(winners_ptr + all_parts, mask=part < parts, other=NOBODY)
                    scores = tl.load(scores_ptr + all_parts, mask=part < parts, other=float("inf"))
                    nearest = first_least(scores, codes)
            nearest = tl.where(nearest == NOBODY, 0, nearest).to(tl.int64)
            place = (head * N + row) * Q + stage + tl.zeros((1,), tl.int32)
            taken = there & done
            tl.store(indices_ptr + place, nearest, mask=taken)
            chosen = codebook + nearest * D
            if DISTANCES:
                tl.store(distances_ptr + place, canonical(left, taken, 1, chosen, taken, D, EUCLIDEAN), mask=taken)
            if STAGED:
                tl.debug_barrier()  # the residual has been read
                for start in range(0, D, CHUNK):
                    dims = start + tl.arange(0, CHUNK)[None, :]
                    values = tl.load(left[:, None] + dims, mask=dims < D)
                    code = tl.load(chosen[:, None] + dims, mask=dims < D)
                    tl.store(left[:, None] + dims, values - code.to(values.dtype), mask=dims < D)


class Tiles(NamedTuple):
    """How the screen is cut; a pure function of device and shapes, see `tiles`."""

    rows: int  # of x a program
    columns: int  # codes of one matrix product
    steps: int  # products a group minimum runs over
    warps: int
    stages: int  # of the pipeline that loads codes


_RESCORED = 16  # rows of a program that re-scores, and values of its codes at a time
_GATHERED = 1024
_ROUNDED = 16  # rows of a program that rounds them
_PARTS = 128  # that the codes are shared out in, at most, for a row scored whole
_SCANNED = 64  # codes that a row scored whole meets at a time, up to 32 dimensions of each: with more some dtypes spill
_ROWS_STAY = ("sm_90", "sm_100", "sm_103")


def width_of(D: int) -> int:
    """D as the screen pads it: to a power of two from 16 to 256, past that to whole chunks of 128."""
    return max(16, 1 << (D - 1).bit_length()) if D <= 256 else -(-D // 128) * 128


def chunk_for(device: Device, width: int) -> int:
    """Dimensions of one product: all up to 256, past that a part."""
    if width <= 256:
        return width
    return 64 if device.backend == "cuda" and device.shared_memory < 128_000 else 128


def few_warps(device: Device, K: int, width: int, raw: bool) -> bool:
    """Whether four warps take 128 rows: codes must be many, as the rows are copied first, for want of registers."""
    return device.arch == "sm_90" and raw and width in (32, 64) and K > 4096


def rounded_before(device: Device, K: int, width: int, dtype: torch.dtype, raw: bool) -> bool:
    """Whether a kernel of its own rounds the rows: where the screen, on rows off every boundary, lacks registers."""
    if width >= 128 or raw:
        return width >= 128 or few_warps(device, K, width, raw)
    if device.arch.startswith("sm_12"):
        return width >= 32 or dtype == torch.float64
    return width >= 64 and (device.arch.startswith("sm_10") or dtype == torch.float64)


def shared_memory(device: Device, tiles: Tiles, width: int) -> int:
    """Bytes of shared memory that the screen needs at most.

    A pipeline of code tiles, 2 bytes an element and 4 a bias: stages * steps * columns * (2 * width + 4), one stage
    fewer on AMD, and the rows, 2 * rows * width: beside the pipeline where the matrix unit reads both from shared
    memory (sm_90, sm_100), else before it. Past a width of 256 both are read in chunks: stages * 2 * chunk *
    (rows + columns).
    """
    if width > 256:
        return tiles.stages * 2 * chunk_for(device, width) * (tiles.rows + tiles.columns)
    rows = 2 * tiles.rows * width
    buffers = tiles.stages - 1 if device.backend == "hip" else tiles.stages
    pipeline = buffers * tiles.steps * tiles.columns * (2 * width + 4)
    return rows + pipeline if device.arch in _ROWS_STAY else max(rows, pipeline)


def tiles_for(device: Device, K: int, width: int, raw: bool = False) -> Tiles:
    """The screen's tiles for a device and a shape: the largest that leave the registers and shared memory whole.

    Long groups cost the loop less and the re-score more; they pay where the codebook is long. Where the registers allow
    two blocks on a multiprocessor (sm_90 up to a width of 128) shared memory must too: on an H100 one block by itself
    took 1.6 times as long as its matrix products and its arithmetic one after the other, waiting in between. There four
    warps take three quarters of the time of eight on 16-bit rows (`raw`) up to a width of 64; at 16 with half the rows.
    """
    if device.backend == "interpreter":
        return Tiles(rows=32, columns=32, steps=2, warps=4, stages=1)
    if device.shared_memory < 128_000 and width > 128:
        return Tiles(rows=64, columns=32, steps=2, warps=8 if device.backend == "cuda" and width > 256 else 4, stages=2)
    if device.arch == "sm_90" and width == 16:
        return Tiles(rows=64, columns=64, steps=2, warps=4, stages=3)
    if few_warps(device, K, width, raw):
        return Tiles(rows=128, columns=64, steps=4, warps=4, stages=2)
    tiles = Tiles(rows=128, columns=64, steps=2, warps=8, stages=2)
    if width > 256:
        return tiles._replace(columns=32)  # with 64 some dtypes spill
    roomy = device.backend == "cuda" and (width >= 128 or device.arch == "sm_90")
    room = device.shared_memory
    if device.arch == "sm_90" and width <= 128:
        room = room // 2 - 512  # the device keeps 1 KiB of each block for itself
    for steps in (4, 2) if K > 8192 and roomy else (2,):
        for stages in (3, 2):
            longer = tiles._replace(steps=steps, stages=stages)
            if shared_memory(device, longer, width) <= room:
                return longer
    return tiles._replace(stages=1)


def choices_for(device: Device, K: int, width: int, raw: bool = False) -> list[Tiles]:
    """What `FASTVQ_AUTOTUNE=1` times: the heuristics' tiles, and their neighbours that fit the shared memory."""
    usual = tiles_for(device, K, width, raw)
    found = [usual]
    cuts = [(rows, columns, 4) for rows in (64, 128) for columns in (32, 64)]
    cuts += [(64, 128, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8)]
    for rows, columns, warps in cuts:
        for steps, stages in itertools.product((1, 2, 4), (2, 3, 4)):
            tiles = Tiles(rows, columns, steps, warps, stages)
            if tiles != usual and shared_memory(device, tiles, width) <= device.shared_memory:
                found.append(tiles)
    return found


def splits_for(device: Device, blocks: int, segments: int) -> int:
    """Into how many parts the codes are split, so that few rows still fill the device."""
    return max(1, min(segments // 2, device.multiprocessors // blocks, 64))


def operand_type(x: Tensor, codebook: Tensor) -> tuple[torch.dtype, bool]:
    """What the screen multiplies, and whether that is the stored values themselves."""
    raw = x.dtype == codebook.dtype and x.dtype in (torch.float16, torch.bfloat16)
    return (x.dtype if raw else torch.float16), raw


def search(
    x: Tensor, codebook: Tensor, metric: str, return_distance: bool, slack: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Indices (...), and squared distances or scores (...) when asked for, else an empty tensor.

    `slack` multiplies the bound of the certificate: below 1 is for the tests that show the bound to be needed.
    """
    device = device_of(x)
    rows = rows_of(x, codebook.dim() == 3)
    codebook = codebook.contiguous().resolve_neg()
    heads, N, D, K = rows.heads, rows.length, rows.dim, codebook.shape[-2]
    double = torch.float64 in (x.dtype, codebook.dtype)
    work = torch.float64 if double else torch.float32
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    distances = torch.empty(x.shape[:-1] if return_distance else (0,), dtype=work, device=x.device)
    if N == 0 or heads == 0:
        return indices, distances
    euclidean = metric == "euclidean"
    where = (rows.tensor, rows.inner, *rows.strides)
    width = width_of(D)
    raw = operand_type(x, codebook)[1]
    tiles = tiles_for(device, K, width, raw)
    if autotune.wanted():
        # N decides how many programs there are; past 2^17 rows that no longer matters.
        kind, size = "rows as they are" if raw else "rounded rows", min(N, 1 << 17)
        what = f"screen, N to {triton.next_power_of_2(size)}, K to {triton.next_power_of_2(K)}, D to {width}, {kind}"
        choices = choices_for(device, K, width, raw)
        tiles = autotune.fastest(
            device, what, choices, lambda tiles: screen(device, rows, codebook, euclidean, width, tiles, slack)
        )
    group = 2 * tiles.steps
    listed, queued, queue = screen(device, rows, codebook, euclidean, width, tiles, slack)
    launch(
        rescore_kernel,
        (triton.cdiv(N, _RESCORED), heads),
        *[*where, codebook, listed, queue, queued, indices, distances, N, K, listed.shape[1]],
        D=D,
        CHUNK=min(width, _GATHERED // (_RESCORED * group)),
        GROUP=group,
        EUCLIDEAN=euclidean,
        DOUBLE=double,
        DISTANCES=return_distance,
        ROWS=_RESCORED,
        num_warps=4,
        num_stages=1,
    )
    score_whole(device, rows, codebook, euclidean, queue, queued, indices, distances if return_distance else None)
    return indices, distances


def score_whole(
    device: Device,
    rows: Rows,
    codebooks: Tensor,
    euclidean: bool,
    queue: Tensor,
    queued: Tensor,
    indices: Tensor,
    distances: Tensor | None,
    stages: int = 1,
) -> None:
    """Take the queued rows through all stages; codebooks ([H,] [Q,] K, D), indices (H, N, Q)."""
    double = torch.float64 in (rows.tensor.dtype, codebooks.dtype)
    work = torch.float64 if double else torch.float32
    K = codebooks.shape[-2]
    programs = min(4 * device.multiprocessors, rows.length * triton.cdiv(K, _SCANNED))

    def each(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows.heads, programs, *shape), dtype=dtype, device=codebooks.device)

    launch(
        whole_kernel,
        (programs, rows.heads),
        *[rows.tensor, rows.inner, *rows.strides, codebooks, queue, queued, each(rows.dim, dtype=work)],
        *[each(dtype=torch.int32), each(dtype=torch.float64), each(dtype=torch.int32).zero_()],
        *[indices, indices if distances is None else distances, rows.length, K, stages],
        D=rows.dim,
        CHUNK=min(width_of(rows.dim), 16 if codebooks.dtype == torch.float64 else 32),
        STAGED=stages > 1,
        EUCLIDEAN=euclidean,
        DOUBLE=double,
        DISTANCES=distances is not None,
        COLUMNS=_SCANNED,
        PARTS=_PARTS,
        num_warps=8,
        num_stages=1,
        **({"maxnreg": 255} if device.backend == "cuda" else {}),  # else ptxas spills a little, for more warps
    )


def screen(
    device: Device, rows: Rows, codebook: Tensor, euclidean: bool, width: int, tiles: Tiles, slack: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The groups that may hold each row's winner, and an empty queue."""
    heads, N, D = rows.heads, rows.length, rows.dim
    dtype, raw = operand_type(rows.tensor, codebook)
    packed = pack_codes(codebook.view(heads, -1, D), dtype, raw, euclidean, width, tiles.columns, tiles.steps)
    segments = packed.segments

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codebook.device)

    where = (rows.tensor, rows.inner, *rows.strides)
    by_kernel = rounded_before(device, codebook.shape[-2], width, rows.tensor.dtype, raw)
    rounded_rows = empty(heads, N, width, dtype=dtype) if by_kernel else packed.codes
    figures = empty(heads, N, 3) if by_kernel else packed.frame
    if by_kernel:
        launch(
            round_rows_kernel,
            (triton.cdiv(N, _ROUNDED), heads),
            *[*where, packed.frame, rounded_rows, figures, N],
            D=D,
            WIDTH=width,
            CHUNK=min(width, 64),
            RAW=raw,
            ROWS=_ROUNDED,
            num_warps=4,
            num_stages=1,
        )
    blocks = triton.cdiv(N, tiles.rows)
    splits = splits_for(device, blocks * heads, segments)
    splits = triton.cdiv(segments, triton.cdiv(segments, splits))
    listed = empty(heads, splits, LISTED.value, N, dtype=torch.int32)
    queued = empty(heads, dtype=torch.int32)
    queue = empty(heads, N, dtype=torch.int64)
    launch(
        screen_kernel,
        (blocks, splits, heads),
        *[*where, rounded_rows, figures, packed.frame, packed.codes, packed.bias, packed.bounds],
        *[listed, queued, N, segments, packed.parts],
        D=D,
        WIDTH=width,
        CHUNK=chunk_for(device, width),
        ROUNDED=by_kernel,
        RAW=raw,
        EUCLIDEAN=euclidean,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        STEPS=tiles.steps,
        BITS=(segments - 1).bit_length(),  # by K alone: N must not choose what is compiled
        PARTS=triton.next_power_of_2(packed.parts),
        SLACK=slack,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return listed, queued, queue
