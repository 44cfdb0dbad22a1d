"""encodec, and audiocraft's twin of it: the codebooks and the residual stages."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from drop_in import check_drop_in
from unpacked import import_alone

from fastvq.interop.patching import differs, library


@pytest.fixture(params=["audiocraft", "encodec"])
def package(request, monkeypatch):
    if request.param == "audiocraft":  # flashy is for training on several machines, and would bring much along
        flashy = ModuleType("flashy")
        flashy.distrib = SimpleNamespace(broadcast_tensors=lambda tensors: None)
        monkeypatch.setitem(sys.modules, "flashy", flashy)
    import_alone(f"{request.param}.quantization.core_vq")
    return request.param


@pytest.fixture
def known(package):
    """The names of the classes that are as fastvq knows them: of encodec's release, the codebook alone."""
    return [c.names[0] for c in library(package).CLIENTS.values() if differs(c) is None]


def residual(package, **options):
    torch.manual_seed(0)
    core = sys.modules[f"{package}.quantization.core_vq"]
    options = {"num_quantizers": 4, "dim": 8, "codebook_size": 37, "kmeans_init": False} | options
    module = core.ResidualVectorQuantization(**options)
    for level, stage in enumerate(module.layers):
        stage._codebook.embed.normal_(0, 0.9**level)
    return module


def test_known_classes(package, known):
    every = ["EuclideanCodebook", "ResidualVectorQuantization"]
    assert known == every or (package, known) == ("encodec", every[:1])


@pytest.mark.parametrize("frames", [1, 23])
def test_encode_and_decode(package, known, frames):
    module, x = residual(package).eval(), torch.randn(3, 8, frames)
    report = check_drop_in(module, lambda m: (m.encode(x), m.decode(m.encode(x, n_q=2)), m(x)))
    assert [m.name for m in report.done] == ["", *(f"layers.{i}._codebook" for i in range(4))][2 - len(known) :]
    assert len(report.left_alone) == 2 - len(known)


@pytest.mark.parametrize("options", [{"codebook_dim": 5}, {"channels_last": True}], ids=str)
def test_stages_one_by_one(package, known, options):
    if package == "encodec" and "channels_last" in options:
        pytest.skip("audiocraft's alone")
    module = residual(package, **options).eval()
    x = torch.randn((3, 23, 8) if "channels_last" in options else (3, 8, 23))
    check_drop_in(module, lambda m: (m.encode(x), m(x, n_q=3)))


@pytest.mark.filterwarnings("ignore:When using RVQ")
@pytest.mark.parametrize("kmeans", [False, True])
def test_training(package, known, kmeans):
    module = residual(package, kmeans_init=kmeans, kmeans_iters=2, threshold_ema_dead_code=1).train()
    x = torch.randn(4, 8, 53, requires_grad=True)
    check_drop_in(module, lambda m: [m(x, n_q=n) for n in (2, None)], rtol=1e-5, atol=1e-6)
