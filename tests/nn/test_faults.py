"""The differential suite must notice faults: ten are put in on purpose, and each must make it fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from differential import SENTINELS, first_failure
from torch import Tensor

import fastvq
from fastvq import functional
from fastvq.nn import codebook
from fastvq.nn.codebook import Codebook

Patch = Callable[[pytest.MonkeyPatch], None]
quantize, learn, move = functional.vector_quantize, Codebook.update, codebook._ema_step


def quantizing(change: Callable[..., Any]) -> Patch:
    """A fault in what the layer gets from `functional.vector_quantize`."""
    return lambda monkeypatch: monkeypatch.setattr(functional, "vector_quantize", change)


def moving(**change: float) -> Patch:
    """A fault in how fast the averages move, or how they are smoothed."""

    def faulty(*arguments: Any) -> None:
        *given, decay, eps, backend = arguments
        move(*given, change.get("decay", decay), change.get("eps", eps), backend)

    return lambda patch: patch.setattr(codebook, "_ema_step", faulty)


def by(indices_of: Callable[[Tensor, Tensor, str], Tensor]) -> Patch:
    """Other indices than the nearest."""

    def change(x: Tensor, codes: Tensor, *, metric: str, mask: Tensor | None, **rest: Any) -> tuple[Tensor, ...]:
        indices = indices_of(x, codes, metric)
        found = torch.stack([book[i] for book, i in zip(codes, indices, strict=True)])
        error = (x - found).square().mean(-1)
        return x + (found - x).detach(), indices, error.mean() if mask is None else error[mask].mean()

    return quantizing(change)


def in_bfloat16(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    return fastvq.search(x.bfloat16(), codes.bfloat16(), metric=metric)


def last_of_equals(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    return codes.shape[1] - 1 - fastvq.search(x, codes.flip(1), metric=metric)


def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[Any, Tensor] = {}
    by(lambda x, codes, metric: fastvq.search(x, first.setdefault(codes.shape, codes.detach().clone()), metric=metric))(
        monkeypatch
    )


FAULTS: dict[str, Patch] = {
    "no encoder gradient": quantizing(lambda *a, **o: (quantize(*a, **o)[0].detach(), *quantize(*a, **o)[1:])),
    "loss doubled": quantizing(lambda *a, **o: (*quantize(*a, **o)[:2], 2 * quantize(*a, **o)[2])),
    "bfloat16 search": by(in_bfloat16),
    "no dead-code replacement": lambda patch: patch.setattr(Codebook, "expire_codes_", lambda *arguments: None),
    "no Laplace smoothing": moving(eps=0.0),
    "one k-means iteration": lambda patch: patch.setattr(
        codebook, "kmeans", lambda rows, size, _, **options: KMEANS(rows, size, 1, **options)
    ),
    "wrong decay": moving(decay=0.99),
    "mask ignored in EMA": lambda patch: patch.setattr(
        Codebook, "update", lambda self, rows, indices, mask, **options: learn(self, rows, indices, None, **options)
    ),
    "last instead of first tie": by(last_of_equals),
    "stale packed codebook": stale,
}
KMEANS = codebook.kmeans


def test_without_a_fault_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor by the means by which faults are put in."""
    assert first_failure(SENTINELS) is None
    by(lambda x, codes, metric: fastvq.search(x, codes, metric=metric))(monkeypatch)
    moving()(monkeypatch)
    assert first_failure(SENTINELS) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    assert first_failure(SENTINELS) is not None
