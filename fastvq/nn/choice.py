"""Which code a row takes: the nearest, one drawn at random, the k nearest, or one of a codebook of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvq import functional
from fastvq.choosing import nearest_codes, sample_codes
from fastvq.nn import losses
from fastvq.nn.codebook import Codebook, EmaWeight
from fastvq.nn.layout import Layout
from fastvq.nn.straight_through import straight_through
from fastvq.nn.transformed import TransformedCodes, TransformFn


class Call(NamedTuple):
    """What one forward of a layer is to do, the defaults of its constructor filled in."""

    topk: int | None
    temperature: float  # of drawing codes and of their mean; 0 takes the nearest
    draws: bool
    training: bool
    taught: bool  # the loss trains the codes
    frozen: bool
    transform: TransformFn | None
    ema_weight: EmaWeight | None
    accumulate: bool
    ema_update: bool | None

    def over_k(self, values: Tensor) -> Tensor:
        """Values (H, B, T, ...) with a dimension for the k codes of a row, where there are several."""
        return values if self.topk is None else values.unsqueeze(3)


class Chosen(NamedTuple):
    """What the rows (H, B, T, D) have been given; with topk, k of each before D."""

    indices: Tensor
    passed: Tensor  # their codes, with the straight-through gradient
    values: Tensor  # their codes, with the gradient to the codebook where it has one
    commitment: Tensor  # the mean squared error, (), or of each row with topk
    transformed: TransformedCodes | None
    counts: Tensor | None = None  # of the rows by code, (H, K), where the search took them


def choose(book: Codebook, layout: Layout, rows: Tensor, mask: Tensor | None, codes: Tensor, call: Call) -> Chosen:
    """Give each row (H, B, T, D) one of the codes (H, K, D), or topk of them.

    The mask (H, B, T) keeps rows out of the commitment loss alone.
    """
    if call.transform is None and call.topk is None and not call.draws:
        return _nearest(book, rows, mask, codes, call)
    transformed, k = None, call.topk or 1
    if call.transform is not None:
        places = layout.by_place(rows)
        transformed = TransformedCodes(call.transform, codes, places, cosine=book.use_cosine_sim)
        picked = transformed.choose(k, call.temperature if call.draws else 0.0)
        indices, values = (layout.from_places(t) for t in (picked, transformed.values(picked)))
        indices, values = (indices, values) if call.topk is not None else (indices.squeeze(-1), values.squeeze(-2))
    else:
        flat = rows.flatten(1, 2)
        picked = (
            sample_codes(flat, codes, metric=book.metric, temperature=call.temperature, k=k)
            if call.draws
            else nearest_codes(flat, codes, k, metric=book.metric)
        )
        indices = picked.unflatten(1, rows.shape[1:3])
        indices = indices if call.topk is not None else indices.squeeze(-1)
        values = book.lookup(codes, indices)
    values = values.to(rows.dtype)
    source = call.over_k(rows).expand_as(values)
    errors = losses.commitment(source, values if call.taught else values.detach())
    if call.topk is None:
        loss = losses.masked_mean(errors, mask)
    else:
        loss = errors if mask is None else torch.where(call.over_k(mask), errors, 0.0)
    return Chosen(indices, straight_through(source, values), values, loss, transformed)


def _nearest(book: Codebook, rows: Tensor, mask: Tensor | None, codes: Tensor, call: Call) -> Chosen:
    """The nearest code, by the fused operator."""
    weight = float(call.training)
    passed, indices, loss, *counts = functional.vector_quantize(
        rows if call.training else rows.detach(),
        codes if call.taught else codes.detach(),
        metric=book.metric,
        commitment_weight=weight,
        codebook_weight=weight if call.taught else 0.0,
        mask=mask,
        # Where no rows are summed, the counts are all that is learnt of them.
        return_counts=call.training and not call.frozen and not book.writes(call.ema_update),
    )
    if call.taught:
        loss = loss - loss.detach() / 2  # one mean((x - q)^2), with the gradients of both its halves
    attached = codes.requires_grad and torch.is_grad_enabled()
    values = book.lookup(codes, indices).to(rows.dtype) if attached else passed.detach()
    return Chosen(indices, passed, values, loss, None, *counts)
