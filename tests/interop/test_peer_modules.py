"""vector-quantize-pytorch: its modules become fastvq's, on the same tensors, and go back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as peer
from drop_in import check_drop_in, tensors
from torch import nn

import fastvq
from fastvq.interop import vector_quantize_pytorch as interop
from fastvq.interop.patching import differs

QUANTIZE = {"dim": 6, "codebook_size": 23}
MODULES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "vq": ("VectorQuantize", {}, (2, 9, 6)),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True}, (2, 9, 6)),
    "projected": ("VectorQuantize", {"codebook_dim": 4, "heads": 2, "layernorm_after_project_in": True}, (2, 9, 6)),
    "heads": ("VectorQuantize", {"codebook_dim": 3, "heads": 2, "separate_codebook_per_head": True}, (2, 9, 6)),
    "learnable": ("VectorQuantize", {"learnable_codebook": True, "ema_update": False}, (2, 9, 6)),
    "image": ("VectorQuantize", {"accept_image_fmap": True, "orthogonal_reg_weight": 0.5}, (2, 6, 3, 4)),
    "affine": ("VectorQuantize", {"affine_param": True, "learnable_codebook": True, "ema_update": False}, (2, 9, 6)),
    "diverse": ("VectorQuantize", {"codebook_diversity_loss_weight": 0.1, "rotation_trick": False}, (2, 9, 6)),
    "kmeans": ("VectorQuantize", {"kmeans_init": True}, (8, 9, 6)),
    "diveq": (
        "VectorQuantize",
        {"directional_reparam": True, "threshold_ema_dead_code": 1, "directional_reparam_variance": 0.0},
        (2, 9, 6),
    ),
    "residual": ("ResidualVQ", {"num_quantizers": 3}, (2, 9, 6)),
    "residual projected": ("ResidualVQ", {"num_quantizers": 3, "codebook_dim": 4}, (2, 9, 6)),
    "residual shared": ("ResidualVQ", {"num_quantizers": 3, "shared_codebook": True}, (2, 9, 6)),
    "residual sizes": ("ResidualVQ", {"codebook_size": (5, 7), "beam_size": 2}, (2, 9, 6)),
    "residual networks": (
        "ResidualVQ",
        {"num_quantizers": 3, "implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 5, "depth": 2}},
        (2, 9, 6),
    ),
    "grouped": ("GroupedResidualVQ", {"num_quantizers": 3, "groups": 2}, (2, 9, 6)),
    "random": ("RandomProjectionQuantizer", {"codebook_dim": 4}, (2, 9, 6)),
    "random, several": ("RandomProjectionQuantizer", {"codebook_dim": 4, "num_codebooks": 2}, (2, 9, 6)),
    "sim": ("SimVQ", {}, (2, 9, 6)),
    "sim, own transform": (
        "SimVQ",
        {"codebook_transform": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6)), "frozen_codebook_dim": 4},
        (2, 9, 6),
    ),
    "residual sim": ("ResidualSimVQ", {"num_quantizers": 2}, (2, 9, 6)),
    "lfq": ("LFQ", {"codebook_size": 16}, (2, 9, 6)),
    "lfq plain": ("LFQ", {"codebook_size": None, "spherical": True, "soft_clamp_input_value": 2.0}, (2, 9, 6)),
    "lfq cosine": (
        "LFQ",
        {"codebook_size": 16, "cosine_sim_project_in": True, "projection_has_bias": False},
        (2, 9, 6),
    ),
    "residual lfq": ("ResidualLFQ", {"codebook_size": 16, "num_quantizers": 2}, (2, 9, 6)),
    "grouped lfq": ("GroupedResidualLFQ", {"codebook_size": 16, "num_quantizers": 2, "groups": 2}, (2, 9, 6)),
    "fsq": ("FSQ", {"codebook_size": ..., "levels": [5, 3, 4], "projection_has_bias": False}, (2, 9, 6)),
    "residual fsq": ("ResidualFSQ", {"codebook_size": ..., "levels": [5, 3], "num_quantizers": 2}, (2, 9, 6)),
    "grouped fsq": (
        "GroupedResidualFSQ",
        {"codebook_size": ..., "levels": [5, 3], "num_quantizers": 2, "groups": 2},
        (2, 9, 6),
    ),
}


def make(case: str) -> tuple[nn.Module, torch.Tensor]:
    name, options, shape = MODULES[case]
    options = {k: v for k, v in {**QUANTIZE, **options}.items() if v is not ...}
    module = getattr(peer, name)(**copy.deepcopy(options))
    x = torch.randn(shape, requires_grad=True)
    module.train()
    for _ in range(2):
        module(x)  # codes that k-means finds, running statistics
    return module, x


@pytest.mark.parametrize("case", sorted(MODULES.keys() - {"affine"}))  # whose statistics move in eval mode, as there
def test_module(case):
    module, x = make(case)
    name = MODULES[case][0]
    report = check_drop_in(module.eval(), lambda m: m(x), rtol=1e-5, atol=1e-5, pickles=case != "lfq plain")
    assert report.done[0].why == f"fastvq.{name}"
    assert not report.left_alone
    fastvq.patch(module)
    assert isinstance(module, getattr(fastvq, name))
    assert isinstance(module, getattr(peer, name))


@pytest.mark.parametrize("case", sorted(MODULES.keys() - {"diveq"}))  # which draws rows for dead codes in another order
def test_training_goes_on(case):
    """Three steps patched, then two unpatched, against five of the client: outputs, parameters, buffers."""
    module, _ = make(case)
    twin = copy.deepcopy(module)
    steps = {m: torch.optim.SGD(m.parameters(), lr=0.1) if list(m.parameters()) else None for m in (module, twin)}
    parameters = list(module.parameters())
    fastvq.patch(module)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    shape = MODULES[case][2]
    for step in range(5):
        x = torch.randn(shape)
        if step == 3:
            fastvq.unpatch(module)
        results = []
        for m, optimizer in steps.items():
            torch.manual_seed(step)
            result = m(x)
            quantized, *losses = [t for t in tensors(result) if t is not None and t.is_floating_point()] or [x]
            if optimizer is not None:
                optimizer.zero_grad()
                loss = quantized.square().mean() + sum(part.mean() for part in losses)
                if loss.requires_grad:
                    loss.backward()
                    optimizer.step()
            results.append(tuple(tensors(result)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_hierarchical(shared):
    """The library's own module round fastvq's."""
    module = peer.HierarchicalVQ(dim=6, codebook_size=17, scales=(1, 2, 4), shared_codebook=shared, kmeans_init=False)
    x = torch.randn(2, 6, 4)
    report = check_drop_in(module.eval(), lambda m: m(x), rtol=1e-5, atol=1e-5)
    assert len(report.done) == (2 if shared else 6)


def test_what_was_changed_by_hand_is_left_alone():
    module, _ = make("vq")
    module._codebook.sample_codebook_temp = 0.5
    module.dim = 5
    report = fastvq.patch(module)
    assert report.done == ()
    assert type(module) is peer.VectorQuantize
    assert report.left_alone[0].why


def test_a_model_with_hooks_moves_and_goes_back():
    module, x = make("residual")
    seen = []
    module.register_forward_hook(lambda *_: seen.append("model"))
    module.layers[0]._codebook.register_buffer("extra", torch.zeros(2))
    report = fastvq.patch(nn.Sequential(module))
    assert report.left_alone[0].name == "0" or report.done
    del module.layers[0]._codebook.extra
    fastvq.patch(module)
    module.eval()(x)
    module.double()
    assert module(x.double())[0].dtype == torch.float64
    fastvq.unpatch(module)
    assert type(module) is peer.ResidualVQ
    assert module.layers[1]._codebook.embed.dtype == torch.float64
    module(x.double())
    assert seen == ["model"] * 3


def test_every_class_of_the_installed_version_is_known():
    assert {c.path: differs(c) for c in interop.CLIENTS.values() if differs(c)} == {}
