"""Random rows of a batch, drawn on its own device: nothing here makes the host wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def random_order(shape: tuple[int, int], mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers 0 .. N-1 in random order for each head, those that the mask leaves out after all others.

    Args:
        shape: (H, N).
        mask: (H, N) bool, or None when all take part.
        device: where to draw.

    Returns:
        order (H, N), int64; and how many of each head take part, (H, 1), int64.
    """
    heads, numbers = shape
    order = torch.stack([torch.randperm(numbers, device=device) for _ in range(heads)])
    if mask is None:
        return order, order.new_full((heads, 1), numbers)
    left_out = (~mask).gather(1, order)
    return order.gather(1, left_out.byte().argsort(dim=1, stable=True)), mask.sum(1, keepdim=True)


def take_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows (H, B, T, D) number b * T + t of each head, numbers (H, K): (H, K, D), without laying the rows out anew."""
    heads = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    tokens = rows.shape[2]
    return rows[heads, numbers // tokens, numbers % tokens]


def rows_for_codes(rows: Tensor, wanted: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A random row for each wanted code, no row twice; when rows run short, for a random subset of those codes.

    Args:
        rows: (H, B, T, D), at least one row.
        wanted: (H, K) bool.
        mask: (H, B, T) bool; rows where it is False are not drawn.

    Returns:
        drawn (H, K, D), in the dtype of rows; served (H, K) bool: the wanted codes that have a row. The others hold
        some row or other.
    """
    codes = wanted.shape[1]
    row_mask = None if mask is None else mask.flatten(1)
    shape = (rows.shape[0], rows.shape[1] * rows.shape[2])
    order, available = random_order(shape, row_mask, rows.device)
    if mask is None and shape[1] >= codes:
        place = wanted.cumsum(1) - 1
    else:
        queue, _ = random_order((wanted.shape[0], codes), wanted, rows.device)
        place = torch.empty_like(queue).scatter_(1, queue, torch.arange(codes, device=rows.device).expand_as(queue))
    numbers = order.gather(1, place.clamp(0, shape[1] - 1))
    return take_rows(rows, numbers), wanted & (place < available)
