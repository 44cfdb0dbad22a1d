"""Activation checkpointing: what is run again is what was run, however many forwards await their backward pass."""

from __future__ import annotations

import copy
import gc
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from common import DIM, assert_same, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvq

IN_PLACE = {
    "learnable_codebook": True,
    "ema_update": False,
    "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ema": {},
    "k-means, dead codes": {"kmeans_init": True, "threshold_ema_dead_code": 3},
    "sampling": {"stochastic_sample_codes": True, "straight_through": True, "rotation_trick": False},
    "affine": {"commitment_use_cross_entropy_loss": True, "affine_param": True},
    "learnable": {"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 3},
    "in place": IN_PLACE,
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 3},
}
WAYS = {"plain": None, "not reentrant": False, "reentrant": True}


def run(way: str, region: Any, x: Tensor) -> Any:
    return region(x) if WAYS[way] is None else checkpoint(region, x, use_reentrant=WAYS[way])


def gradients_and_state(layer: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    found = {f"x{number}": x.grad for number, x in enumerate(inputs)}
    found |= {f"grad {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    found = {name: value.clone() for name, value in (found | layer.state_dict()).items()}
    layer.zero_grad()
    return found


def two_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(40, DIM, requires_grad=True), torch.randn(40, DIM, requires_grad=True)


def one_region(layer: nn.Module, way: str) -> dict[str, Tensor]:
    """Called twice in a region, with a dropout behind, whose draws must be the same again."""
    x, _ = two_inputs()

    def region(x: Tensor) -> Tensor:
        first, _, loss = layer(x)
        second, _, other = layer(nn.functional.dropout(first.sin(), 0.5) + x.flip(0))
        return (nn.functional.dropout(second, 0.5) * x.cos()).sum() + loss + other

    run(way, region, x).backward()
    return gradients_and_state(layer, x)


def two_regions(layer: nn.Module, way: str) -> dict[str, Tensor]:
    """Two forwards, of the same values too, before the backward pass, which takes the second first."""
    x, y = two_inputs()
    y.data.copy_(x)
    (quantized, _, loss), (other, _, other_loss) = (run(way, layer, value) for value in (x, y))
    (quantized.sin().sum() + (other * other.roll(1, 0)).sum() + loss + other_loss).backward()
    return gradients_and_state(layer, x, y)


@pytest.mark.parametrize("calls", [one_region, two_regions])
@pytest.mark.parametrize("name", OPTIONS)
def test_several_forwards(calls: Any, name: str) -> None:
    found = {}
    for way in WAYS:
        layer, _ = pair(decay=0.5, **OPTIONS[name])
        torch.manual_seed(0)
        found[way] = [calls(layer, way) for _ in range(2)]
    if name == "directional":  # there what a call returns depends on whether gradients are recorded
        del found["reentrant"]
    for way in list(found)[1:]:
        for mine, plain in zip(found[way], found["plain"], strict=True):
            assert_same(mine, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_codebook": True},
        {"shared_codebook": True, "threshold_ema_dead_code": 3},
        {"shared_codebook": True, "kmeans_init": True, "threshold_ema_dead_code": 3, "rotation_trick": False},
        {"shared_codebook": True, **IN_PLACE},
        {"threshold_ema_dead_code": 3, "use_cosine_sim": True, "quantize_dropout": True},
        {"beam_size": 2, "threshold_ema_dead_code": 3},
    ],
    ids=",".join,
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_residual_stages(options: dict[str, Any], reentrant: bool) -> None:
    found = []
    for way in ("plain", "reentrant" if reentrant else "not reentrant"):
        torch.manual_seed(1)
        layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=13, decay=0.5, **options)
        for _ in range(2):
            x = torch.randn(2, 20, DIM, requires_grad=True)
            quantized, _, losses = run(way, layer, x)
            (quantized.sin().sum() + losses.sum()).backward()
        found.append(gradients_and_state(layer, x))
    assert_same(found[1], found[0], rtol=1e-6, atol=1e-6)


def test_other_modules_learn_once() -> None:
    """One codebook for every scale, and values with an optimizer of their own."""
    builds = {
        "hierarchical": lambda: fastvq.HierarchicalVQ(dim=4, codebook_size=13, scales=(1, 2, 4), kmeans_init=False),
        "latent": lambda: fastvq.LatentQuantize(
            levels=[3, 4], dim=2, in_place_codebook_optimizer=partial(torch.optim.SGD, lr=0.5)
        ),
    }
    for name, build in builds.items():
        found = []
        for way in ("plain", "not reentrant", "reentrant"):
            torch.manual_seed(1)
            layer = build()
            x = torch.randn(2, 4 if name == "hierarchical" else 2, 4, requires_grad=True)
            quantized, _, loss, *_ = run(way, layer, x)
            (quantized.sin().sum() + loss).backward()
            found.append(gradients_and_state(layer, x))
        for other in found[1:]:
            assert_same(other, found[0], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_told_apart_is_refused() -> None:
    """A checkpoint within a checkpoint is a new one when the outer is run again."""

    def nested(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)[0]

    layer, _ = pair()
    x = torch.randn(40, DIM, requires_grad=True)
    outer = checkpoint(lambda x: nested(layer, x) + nested(layer, x.flip(0)), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="no checkpoint within another"):
        outer.sin().sum().backward()


def test_nothing_is_kept_longer_than_its_region() -> None:
    for way in WAYS:
        layer, _ = pair()
        kept = layer._codebook._recording._runs
        x = torch.randn(40, DIM, requires_grad=True)
        output = run(way, layer, x)[0].sin().sum()
        assert len(kept) == (way != "plain")
        copied = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert not any(len(other._codebook._recording._runs) for other in copied)
        output.backward()
        del output
        gc.collect()
        assert len(kept) == 0, way
