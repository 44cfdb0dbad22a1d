"""The codebook follows its moving averages, in place.

The smoothing needs the total of a head's new sizes before its first code can be written. Up to _ALONE codes it is one
kernel: every program adds up all sizes of its head itself. Beyond, that would take as long as the update, and a kernel
before it leaves the totals of blocks. Either way sizes and totals are added pair by pair, an order that neither layout
nor device changes. The old sizes are read from a copy, as other programs, and other warps, overwrite them meanwhile.
Codes that have died are marked on the device by what is stored: their cluster_size is below the caller's threshold, no
host needs to look.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .pointwise import as_float64, bits, narrow, tile_for

_BLOCK = 1024  # codes that are added up to one number: fixed, and with it the order of the total
_ALONE = 4096  # codes of a head that one kernel serves: of D = 256 its programs then read 16 MiB of sizes from cache


@triton.jit
def pairwise_sum(values: tl.tensor, LEVELS: tl.constexpr) -> Any:
    """The sum of 2^LEVELS values: of neighbours, of neighbouring pairs, and so on."""
    for _ in tl.static_range(LEVELS):
        values = tl.sum(tl.reshape(values, (values.shape[0] // 2, 2)), axis=1)
    return tl.sum(values, axis=0)


@triton.jit
def block_total(
    old: tl.tensor,  # of the head
    counts: tl.tensor,
    counts_k: tl.tensor,
    block: tl.tensor,
    K: tl.tensor,
    decay: tl.tensor,
    LEVELS: tl.constexpr,
) -> Any:
    """The new sizes of a block of 2^LEVELS codes, added up; float64."""
    code = (block * (1 << LEVELS) + tl.arange(0, 1 << LEVELS)).to(tl.int64)
    size = tl.load(old + code, mask=code < K, other=0.0).to(tl.float64)
    count = tl.load(counts + code * counts_k, mask=code < K, other=0.0).to(tl.float64)
    return pairwise_sum(decay * size + (1 - decay) * count, LEVELS)


@triton.jit(do_not_specialize=["decay_bits"])
def total_kernel(
    old_ptr: tl.tensor,  # (H, K), of cluster_size
    counts_ptr: tl.tensor,  # (H, K)
    counts_h: tl.tensor,
    counts_k: tl.tensor,
    totals_ptr: tl.tensor,  # out (H, blocks) float64
    decay_bits: tl.tensor,
    K: tl.tensor,
    LEVELS: tl.constexpr,
) -> None:
    """The totals of the blocks of codes. Grid (blocks, H)."""
    head = tl.program_id(1).to(tl.int64)
    old, counts = old_ptr + head * K, counts_ptr + head * counts_h
    total = block_total(old, counts, counts_k, tl.program_id(0), K, as_float64(decay_bits), LEVELS)
    tl.store(totals_ptr + head * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["decay_bits", "eps_bits"])
def update_kernel(
    codebook_ptr: tl.tensor,  # in place (H, K, D)
    codebook_h: tl.tensor,
    codebook_k: tl.tensor,
    codebook_d: tl.tensor,
    size_ptr: tl.tensor,  # out (H, K)
    size_h: tl.tensor,
    size_k: tl.tensor,
    old_ptr: tl.tensor,  # (H, K), a copy of what was there
    average_ptr: tl.tensor,  # in place (H, K, D)
    average_h: tl.tensor,
    average_k: tl.tensor,
    average_d: tl.tensor,
    counts_ptr: tl.tensor,  # (H, K)
    counts_h: tl.tensor,
    counts_k: tl.tensor,
    sums_ptr: tl.tensor,  # (H, K, D)
    sums_h: tl.tensor,
    sums_k: tl.tensor,
    sums_d: tl.tensor,
    totals_ptr: tl.tensor,  # (H, blocks) float64, or None
    blocks: tl.tensor,
    decay_bits: tl.tensor,
    eps_bits: tl.tensor,
    K: tl.tensor,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sizes, averages and codes of a few codes. Grid (code blocks, H)."""
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    decay, eps = as_float64(decay_bits), as_float64(eps_bits)
    old, counts = old_ptr + head * K, counts_ptr + head * counts_h
    lane = tl.arange(0, 1 << LEVELS)
    totals = tl.zeros((1 << LEVELS,), tl.float64)
    if totals_ptr is None:
        for block in range(0, blocks):
            total = block_total(old, counts, counts_k, block, K, decay, LEVELS)
            totals += tl.where(lane == block % (1 << LEVELS), total, 0.0)
    else:
        for start in range(0, blocks, 1 << LEVELS):
            block = start + lane
            totals += tl.load(totals_ptr + head * blocks + block, mask=block < blocks, other=0.0)
    total = pairwise_sum(totals, LEVELS)

    size = tl.load(old + code, mask=code < K, other=0.0).to(tl.float64)
    count = tl.load(counts + code * counts_k, mask=code < K, other=0.0).to(tl.float64)
    size = decay * size + (1 - decay) * count
    tl.store(size_ptr + head * size_h + code * size_k, narrow(size, size_ptr.dtype.element_ty), mask=code < K)
    smoothed = (size + eps) / (total + K * eps) * total

    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        inside = (code < K)[:, None] & (column < D)
        at_average = average_ptr + head * average_h + (code * average_k)[:, None] + column * average_d
        at_sum = sums_ptr + head * sums_h + (code * sums_k)[:, None] + column * sums_d
        at_code = codebook_ptr + head * codebook_h + (code * codebook_k)[:, None] + column * codebook_d
        average = tl.load(at_average, mask=inside, other=0.0).to(tl.float64)
        average = decay * average + (1 - decay) * tl.load(at_sum, mask=inside, other=0.0).to(tl.float64)
        tl.store(at_average, narrow(average, average_ptr.dtype.element_ty), mask=inside)
        tl.store(at_code, narrow(average / smoothed[:, None], codebook_ptr.dtype.element_ty), mask=inside)


def ema_update_(
    codebook: Tensor, cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> None:
    """The moving averages and the codebook, in place; float64 within, each stored tensor rounded once."""
    tensors = (codebook, cluster_size, embed_avg, counts.resolve_neg(), sums.resolve_neg())
    by_head = tensors if codebook.dim() == 3 else tuple(t.unsqueeze(0) for t in tensors)
    codes, sizes, averages, counts, sums = by_head
    heads, K, D = codes.shape
    blocks, levels = triton.cdiv(K, _BLOCK), _BLOCK.bit_length() - 1
    old = sizes.clone(memory_format=torch.contiguous_format)
    totals = None
    if K > _ALONE:
        totals = torch.empty((heads, blocks), dtype=torch.float64, device=codebook.device)
        launch(
            total_kernel,
            (blocks, heads),
            *[old, counts, *counts.stride(), totals, bits(decay), K],
            LEVELS=levels,
            num_warps=4,
        )
    tile = tile_for(D)
    launch(
        update_kernel,
        (triton.cdiv(K, tile.rows), heads),
        *[codes, *codes.stride(), sizes, *sizes.stride(), old],
        *[argument for t in (averages, counts, sums) for argument in (t, *t.stride())],
        *[totals, blocks, bits(decay), bits(eps), K],
        D=D,
        LEVELS=levels,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=8,  # with four some dtypes spill
    )
    # Autograd must see the writes: a codebook saved for backward and updated since is an error, not a wrong gradient.
    torch.autograd.graph.increment_version((codebook, cluster_size, embed_avg))
