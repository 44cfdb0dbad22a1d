"""Entropies over the 2^d codes of d independent bits, without a matrix of rows times codes.

The probability of a code is the product of those of its bits. Cut the bits into two halves: p[n, h, l] is
u[n, h] v[n, l], with 2^(d/2) columns each, and everything that is asked of p follows from u and v.

- The mean over the rows of p is one matrix product, u'v / N.
- The entropy of a row, with log(max(p, floor)) for log(p), needs the sums over the codes with p at least the floor. For
  one h these are the l with log v[l] >= log(floor) - log u[h]: a prefix, once log v and those thresholds are sorted
  together. So one sort of 2^(d/2 + 1) numbers a row, and running sums, give it for all h; and for all l, from the
  other end.

Rows are taken some thousands at a time. Memory is O(N d + 2^d), work O(N 2^d) in matrix products and
O(N 2^(d/2) d) in the sorts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

FLOOR = 1e-5  # the smallest probability that a logarithm is taken of, that of vector-quantize-pytorch
_PIECE = 1 << 19  # numbers in a table of half codes; some ten such tables are alive at once


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log(max(p, 1e-5)) over the last dimension, in nats."""
    return -(probabilities * probabilities.clamp(min=FLOOR).log()).sum(-1)


def _halves(bits: int) -> tuple[int, int]:
    return bits // 2, bits - bits // 2


def _log_probabilities(logits: Tensor) -> Tensor:
    """Of the codes of some bits, the first bit the highest: (C, N, m) to (C, N, 2^m)."""
    table = logits.new_zeros(*logits.shape[:-1], 1)
    for one, zero in zip(logsigmoid(logits).unbind(-1), logsigmoid(-logits).unbind(-1), strict=True):
        table = torch.stack([table + zero.unsqueeze(-1), table + one.unsqueeze(-1)], -1).flatten(-2)
    return table


def _tables(logits: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_log_probabilities(half) for half in logits.split(_halves(logits.shape[-1]), -1))  # type: ignore[return-value]


def _pieces(logits: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    codebooks, rows, bits = logits.shape
    size = max(1, _PIECE // (codebooks * 2 ** (bits - bits // 2)))
    for start in range(0, rows, size):
        yield logits[:, start : start + size], weights[start : start + size]


def _prefix_sums(order: Tensor, values: Tensor, *, left: bool) -> Tensor:
    """Sums of `values`, in the left or right columns, over all that stand at or before (right: after) each column."""
    columns = values.shape[-1]
    padding = values.new_zeros(()).expand(*values.shape[:-1], order.shape[-1] - columns)
    values = torch.cat([values, padding] if left else [padding, values], -1).gather(-1, order)
    sums = values.cumsum(-1) if left else values.flip(-1).cumsum(-1).flip(-1)
    sums = torch.empty_like(sums).scatter_(-1, order, sums)
    return sums[..., columns:] if left else sums[..., :-columns]


def _floored(log_own: Tensor, mass: Tensor, mass_log: Tensor) -> tuple[Tensor, Tensor]:
    """Of the codes that share one half: their part of the entropy, and the sum of p times its derivative.

    `log_own` is the log probability of that half; `mass` and `mass_log` sum v and v log v over the other halves that
    stay above the floor with it. All other codes have -p log(floor).
    """
    own = log_own.exp()
    above = own * mass
    part = math.log(FLOOR) * (above - own) - own * (log_own * mass + mass_log)
    return part, part - above


def _row_entropy(log_u: Tensor, log_v: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Entropy (C, N) of the codes u v; and the derivative to log p, times p, summed to each u and to each v."""
    order = torch.cat([log_v, math.log(FLOOR) - log_u], -1).argsort(dim=-1, descending=True, stable=True)
    v = log_v.exp()
    part, to_u = _floored(log_u, _prefix_sums(order, v, left=True), _prefix_sums(order, v * log_v, left=True))
    if not gradient:
        return part.sum(-1), None, None
    u = log_u.exp()
    _, to_v = _floored(log_v, _prefix_sums(order, u, left=False), _prefix_sums(order, u * log_u, left=False))
    return part.sum(-1), to_u, to_v


def _to_logits(logits: Tensor, to_u: Tensor, to_v: Tensor) -> Tensor:
    """From derivatives to log p, times p, summed to the half codes, the gradient (C, N, d) of the logits.

    d log p / d logit is 1 - s for a bit of 1 and -s for a bit of 0, with s the probability of 1; the two are summed
    apart, since their difference would lose what a nearly certain bit has.
    """
    gradients = []
    for half, to_codes in zip(logits.split(_halves(logits.shape[-1]), -1), (to_u, to_v), strict=True):
        places = torch.arange(half.shape[-1] - 1, -1, -1, device=half.device)
        ones = (torch.arange(2 ** half.shape[-1], device=half.device).unsqueeze(-1) >> places & 1).to(half)
        gradients.append((to_codes @ ones) * torch.sigmoid(-half) - (to_codes @ (1 - ones)) * torch.sigmoid(half))
    return torch.cat(gradients, -1)


class _BitEntropies(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, weights: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        codebooks, _, bits = logits.shape
        high, low = _halves(bits)
        with torch.autocast(logits.device.type, enabled=False):
            total = logits.new_zeros(())
            mean = logits.new_zeros(codebooks, 2**high, 2**low)
            gradients = [logits[:, :0]]
            for rows, weight in _pieces(logits, weights):
                log_u, log_v = _tables(rows)
                entropies, to_u, to_v = _row_entropy(log_u, log_v, gradient)
                total = total + (entropies * weight).sum()
                mean = mean.baddbmm(log_u.exp().mul_(weight.unsqueeze(-1)).mT, log_v.exp())
                if to_u is not None and to_v is not None:
                    gradients.append(_to_logits(rows, to_u, to_v) * (weight.unsqueeze(-1) / codebooks))
        return total / codebooks, mean.flatten(1), torch.cat(gradients, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entropy: Tensor, grad_mean: Tensor, _: Any) -> tuple[Tensor, None, None]:
        logits, weights, kept = ctx.saved_tensors
        high, low = _halves(logits.shape[-1])
        gradients = [logits[:, :0]]
        with torch.autocast(logits.device.type, enabled=False):
            to_codes = grad_mean.unflatten(1, (2**high, 2**low))
            for rows, weight in _pieces(logits, weights):
                u, v = (table.exp() for table in _tables(rows))
                to_u, to_v = u * (v @ to_codes.mT), v * (u @ to_codes)
                gradients.append(_to_logits(rows, to_u, to_v) * weight.unsqueeze(-1))
        return torch.cat(gradients, 1).add_(kept * grad_entropy), None, None


def bit_entropies(logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean entropy of a row, and the mean distribution over the codes of all rows.

    Args:
        logits: (C, N, d), log odds of each bit of each row in each of C codebooks; float32 or float64.
        weights: (N,), what each row counts for; they should sum to 1.

    Returns:
        entropy (): the weighted mean of -sum p log(max(p, 1e-5)) over the rows and codebooks, in nats; mean (C, 2^d):
        the weighted mean of p, the first bit the highest of the code. Both are differentiable to the logits, exactly;
        a code below the floor has -p log(1e-5), as torch differentiates a clamp.
    """
    gradient = torch.is_grad_enabled() and logits.requires_grad
    mean_entropy, mean, _ = _BitEntropies.apply(logits, weights, gradient)
    return mean_entropy, mean
