"""The differential suite of the residual classes must notice faults: each that is put in must make it fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from differential import first_failure
from test_residual_peer import LEARNABLE, MASK, OPTIONS, compare, twins
from torch import Tensor

from fastvq import functional
from fastvq.nn import residual_vq
from fastvq.nn.beam import Beams
from fastvq.nn.residual_vq import ResidualVQ

Patch = Callable[[pytest.MonkeyPatch], None]


def case(key: str, name: str = "ResidualVQ", call: dict[str, Any] | None = None, **options: Any) -> Callable[[], None]:
    """A small part of the suite."""
    return lambda: compare(twins(name, **OPTIONS[key] | options), steps=2, **(call or {}))


SENTINELS = {
    "default": case("default"),
    "straight-through": case("straight-through"),
    "learnable": case("learnable"),
    "mask": case("default", call={"mask": MASK}),
    "shared": case("shared"),
    "QINCo": case("QINCo"),
    "beams": case("beams, weighted"),
    "groups": case("default", "GroupedResidualVQ", {"shape": (3, 17, 12)}, dim=12, groups=2),
    "dropout": lambda: [
        compare(twins(quantize_dropout=True, **LEARNABLE), steps=1, rand_quantize_dropout_fixed_seed=seed)
        for seed in range(3)
    ],
}
quantize = functional.residual_quantize
stage_call, in_turn = ResidualVQ._stage_call, ResidualVQ._in_turn


def quantizing(change: Callable[..., Any]) -> Patch:
    """A fault in what the layer gets from `functional.residual_quantize`."""
    return lambda patch: patch.setattr(functional, "residual_quantize", change)


def learning_from_the_input(self: ResidualVQ, rows: Tensor, codes: Tensor, indices: Tensor, books: list[Any]) -> None:
    for book, index in zip(books, indices.unbind(-1), strict=True):
        book.update(rows.unsqueeze(0), index.unsqueeze(0), None)


def the_first(self: Beams, width: int) -> Beams:
    return Beams(*(part[:, :, :width] for part in vars(self).values()))


def in_reverse(x: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    quantized, indices, losses = quantize(x, codes.flip(0))
    return quantized, indices.flip(-1), losses.flip(0)


FAULTS: dict[str, Patch] = {
    "no encoder gradient": quantizing(lambda x, codes: quantize(x.detach(), codes)),
    "the straight-through gradient once": lambda patch: patch.setattr(
        residual_vq, "straight_through", lambda soft, hard: hard
    ),
    "the rotation of the sum, not of each stage": lambda patch: patch.setattr(
        residual_vq, "rotate_residual_gradient", lambda x, q, indices, codes: residual_vq.straight_through(x, q)
    ),
    "losses of other stages": quantizing(lambda x, codes: (*quantize(x, codes)[:2], quantize(x, codes)[2].flip(0))),
    "stages in reverse": quantizing(in_reverse),
    "stages that learn from the input": lambda patch: patch.setattr(ResidualVQ, "_learn", learning_from_the_input),
    "a shared codebook that never learns": lambda patch: patch.setattr(
        ResidualVQ, "_finish_shared", lambda *arguments: None
    ),
    "stages that never drop out": lambda patch: patch.setattr(ResidualVQ, "_last_stage", lambda *arguments: None),
    "mask ignored": lambda patch: patch.setattr(
        ResidualVQ, "_in_turn", lambda self, rows, call: in_turn(self, rows, call._replace(mask=None))
    ),
    "networks that see no code": lambda patch: patch.setattr(
        ResidualVQ, "_stage_call", lambda self, number, total, call: stage_call(self, number, 0 * total, call)
    ),
    "beams that are never compared": lambda patch: patch.setattr(Beams, "best", the_first),
}


def test_without_a_fault_nothing_fails() -> None:
    assert first_failure(SENTINELS) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    assert first_failure(SENTINELS) is not None
