"""The codebook follows its moving averages, in place.

Two kernels: the smoothing needs the total of a head before its first code can be written, and the sizes that the total
is made of are overwritten, so no program may take it from them while another writes. Codes that have died are marked
on the device by what is stored: their cluster_size is below the caller's threshold, no host needs to look.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .pointwise import as_float64, bits, narrow, tile_for

_BLOCK = 1024  # codes that a program adds up: fixed, and with it the order of the total


@triton.jit(do_not_specialize=["decay_bits"])
def total_kernel(
    size_ptr: tl.tensor,  # (H, K), of cluster_size
    size_h: tl.tensor,
    size_k: tl.tensor,
    counts_ptr: tl.tensor,  # (H, K)
    counts_h: tl.tensor,
    counts_k: tl.tensor,
    totals_ptr: tl.tensor,  # out (H, blocks) float64
    decay_bits: tl.tensor,
    K: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The new sizes of a block of codes, added up. Grid (blocks, H)."""
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    decay = as_float64(decay_bits)
    size = tl.load(size_ptr + head * size_h + code * size_k, mask=code < K, other=0.0).to(tl.float64)
    count = tl.load(counts_ptr + head * counts_h + code * counts_k, mask=code < K, other=0.0).to(tl.float64)
    total = tl.sum(decay * size + (1 - decay) * count, axis=0)
    tl.store(totals_ptr + head * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["decay_bits", "eps_bits"])
def update_kernel(
    codebook_ptr: tl.tensor,  # in place (H, K, D)
    codebook_h: tl.tensor,
    codebook_k: tl.tensor,
    codebook_d: tl.tensor,
    size_ptr: tl.tensor,  # in place (H, K)
    size_h: tl.tensor,
    size_k: tl.tensor,
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
    totals_ptr: tl.tensor,  # (H, blocks) float64
    blocks: tl.tensor,
    decay_bits: tl.tensor,
    eps_bits: tl.tensor,
    K: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sizes, averages and codes of a few codes. Grid (code blocks, H)."""
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    decay, eps = as_float64(decay_bits), as_float64(eps_bits)
    totals = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        totals += tl.load(totals_ptr + head * blocks + block, mask=block < blocks, other=0.0)
    total = tl.sum(totals, axis=0)

    at_size = size_ptr + head * size_h + code * size_k
    size = tl.load(at_size, mask=code < K, other=0.0).to(tl.float64)
    count = tl.load(counts_ptr + head * counts_h + code * counts_k, mask=code < K, other=0.0).to(tl.float64)
    size = decay * size + (1 - decay) * count
    tl.store(at_size, narrow(size, size_ptr.dtype.element_ty), mask=code < K)
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
    blocks = triton.cdiv(K, _BLOCK)
    totals = torch.empty((heads, blocks), dtype=torch.float64, device=codebook.device)
    launch(
        total_kernel,
        (blocks, heads),
        *[sizes, *sizes.stride(), counts, *counts.stride(), totals, bits(decay), K],
        BLOCK=_BLOCK,
        num_warps=4,
    )
    tile = tile_for(D)
    launch(
        update_kernel,
        (triton.cdiv(K, tile.rows), heads),
        *[argument for t in (codes, sizes, averages, counts, sums) for argument in (t, *t.stride())],
        *[totals, blocks, bits(decay), bits(eps), K],
        D=D,
        BLOCK=_BLOCK,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=4,
    )
    # Autograd must see the writes: a codebook saved for backward and updated since is an error, not a wrong gradient.
    torch.autograd.graph.increment_version((codebook, cluster_size, embed_avg))
