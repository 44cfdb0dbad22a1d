"""All stages of a euclidean residual quantiser in one call, from codebooks that the client keeps apart."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastvq.backends import cpu
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


@dataclass(frozen=True)
class _Fixed:
    """Codebooks that the client has taken for constant, side by side."""

    originals: tuple[Tensor, ...]
    versions: tuple[int, ...]
    codebooks: Tensor
    token: int


_tokens = itertools.count(1)
_fixed: WeakKeyDictionary[nn.Module, _Fixed] = WeakKeyDictionary()


def fixed_codes(owner: nn.Module, latents: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """`residual_codes` of codebooks that the client makes once: they are copied, and packed, when they are others.

    They are known by being the same tensors, which nothing has written to in place.
    """
    if latents.device.type != "cpu" or torch.compiler.is_compiling():
        return residual_codes(latents, torch.stack(tuple(codebooks)))
    versions = tuple(0 if c.is_inference() else c._version for c in codebooks)
    fixed, count = _fixed.get(owner), len(codebooks)
    if (
        fixed is None
        or len(fixed.originals) < count
        or fixed.versions[:count] != versions
        or any(a is not b for a, b in zip(codebooks, fixed.originals, strict=False))
    ):
        with torch.no_grad():
            fixed = _Fixed(tuple(codebooks), versions, torch.stack(tuple(codebooks)), next(_tokens))
        _fixed[owner] = fixed
    with cpu.unchanged_codebooks(fixed.token):
        return residual_codes(latents, fixed.codebooks[:count])
