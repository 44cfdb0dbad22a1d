"""The module that stands in for vector-quantize-pytorch has every name that the package exports."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
import vector_quantize_pytorch as peer
from torch import nn

import fastvq
import fastvq.compat.vector_quantize_pytorch as ours

EXPORTED = sorted(name for name, value in vars(peer).items() if inspect.isclass(value))


def test_the_walk_finds_names() -> None:
    assert {"VectorQuantize", "ResidualVQ", "FSQ", "LFQ", "Sequential"} <= set(EXPORTED)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name(name: str) -> None:
    """It is there, and takes the same arguments."""
    mine = getattr(ours, name)
    assert name in ours.__all__
    assert name in dir(ours)
    assert mine is (ours.Sequential if name == "Sequential" else getattr(fastvq, name))
    accepted = set(inspect.signature(mine).parameters) - {"strict_compat"}
    assert accepted == set(inspect.signature(getattr(peer, name)).parameters)


def test_names_that_nobody_has() -> None:
    with pytest.raises(AttributeError, match="no attribute 'VectorQuantise', nor does"):
        ours.VectorQuantise  # noqa: B018
    assert set(ours.__all__) <= set(EXPORTED)
    importlib.reload(ours)  # and star imports work
    exec("from fastvq.compat.vector_quantize_pytorch import *", namespace := {})
    assert namespace["FSQ"] is fastvq.FSQ


def test_sequential_is_the_peers() -> None:
    before, after = nn.Linear(5, 4), nn.Linear(4, 3)
    outputs = []
    for package in (ours, peer):
        torch.manual_seed(0)
        model = package.Sequential(before, package.LFQ(dim=4), nn.GELU(), after)
        outputs.append((list(model.state_dict()), model(torch.ones(2, 6, 5), inv_temperature=3.0)))
    assert outputs[0][0] == outputs[1][0]
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 2])
def test_sequential_holds_one_quantiser(count: int) -> None:
    with pytest.raises(ValueError, match=rf"exactly one of fastvq's quantisers; got {count} in \(GELU"):
        ours.Sequential(nn.GELU(), *(fastvq.FSQ([5, 5]) for _ in range(count)))
