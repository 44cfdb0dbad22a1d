"""All stages of a euclidean residual quantiser in one call, from codebooks that the client keeps apart."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastvq.functional import residual_quantize

_lock = threading.Lock()
_rooms: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def one_call(latents: Tensor, codebooks: Sequence[Tensor]) -> bool:
    """Whether one call does what the stages would one after another.

    It keeps residuals in float32 (float64 for float64): so does the client where everything has that dtype.
    """
    if not codebooks or latents.dim() != 3 or latents.dtype not in (torch.float32, torch.float64):
        return False
    like = codebooks[0]
    return all(c.dtype == latents.dtype and c.shape == like.shape and c.device == latents.device for c in codebooks)


def residual_codes(latents: Tensor, codebooks: Tensor) -> Tensor:
    """The codes (Q, B, T) of latents (B, D, T) by codebooks (Q, K, D)."""
    with torch.no_grad():
        return residual_quantize(latents.transpose(1, 2), codebooks)[1].permute(2, 0, 1).contiguous()


def stacked_codes(owner: nn.Module, latents: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """`residual_codes` of codebooks that may change at any time: they are copied side by side first.

    On a CPU into the same memory each time, which is kept for `owner`: fresh memory costs more than the copy.
    """
    codebooks = tuple(codebooks)
    # The lock is not waited for: whoever comes second takes memory of its own.
    if latents.device.type != "cpu" or torch.compiler.is_compiling() or not _lock.acquire(blocking=False):
        return residual_codes(latents, torch.stack(codebooks))
    try:
        room = _rooms.get(owner)
        fits = room is not None and room.dtype == latents.dtype and room.shape[1:] == codebooks[0].shape
        if room is None or not fits or len(room) < len(codebooks):
            with torch.inference_mode(False):
                room = _rooms[owner] = torch.empty((len(codebooks), *codebooks[0].shape), dtype=latents.dtype)
        with torch.no_grad():
            torch.stack(codebooks, out=room[: len(codebooks)])
        return residual_codes(latents, room[: len(codebooks)])
    finally:
        _lock.release()


def stages_in_turn(stages: Iterable[Any], latents: Tensor) -> Tensor:
    """What `residual_codes` gives, stage by stage in the client's own arithmetic."""
    codes = []
    for stage in stages:
        codes.append(stage.encode(latents))
        latents = latents - stage.decode(codes[-1])
    return torch.stack(codes)


def side_by_side(codebooks: Sequence[Tensor]) -> Tensor | None:
    """Tensors (K, D) that lie one after another in one piece of memory as one tensor (Q, K, D), or None."""
    first = codebooks[0]
    step = first.numel()
    for number, codebook in enumerate(codebooks):
        apart = codebook.data_ptr() - first.data_ptr()
        if apart != number * step * first.element_size() or not codebook.is_contiguous():
            return None
    if any(c.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for c in codebooks):
        return None
    return first.as_strided((len(codebooks), *first.shape), (step, first.shape[1], 1))
