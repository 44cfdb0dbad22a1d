"""diffusers: VQModel and its quantiser."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from drop_in import check_drop_in

import fastvq
from fastvq.interop import diffusers as interop
from fastvq.interop.patching import differs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import VQModel
    from diffusers.models.autoencoders.vae import VectorQuantizer


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("sane", [True, False])
@pytest.mark.parametrize("remap", [None, 3, "extra"])
def test_quantizer(legacy, sane, remap, tmp_path):
    used = tmp_path / "used.npy"
    np.save(used, np.arange(0, 37, 2))
    options = {} if remap is None else {"remap": str(used), "unknown_index": remap}
    module = VectorQuantizer(37, 6, beta=0.3, sane_index_shape=sane, legacy=legacy, **options)
    torch.nn.init.normal_(module.embedding.weight)
    x = torch.randn(2, 6, 5, 4)
    for training in (False, True):
        assert check_drop_in(module.train(training), lambda m: m(x)).done


def test_model():
    model = VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, num_vq_embeddings=50, vq_embed_dim=4
    ).eval()
    x = torch.randn(1, 3, 16, 16)
    report = check_drop_in(model, lambda m: m(x).sample, rtol=1e-5, atol=1e-5)
    assert [m.name for m in report.done] == ["quantize"]
    latents = model.encode(x).latents
    expected = model.quantize(latents)[2][2]
    fastvq.patch(model)
    assert model.quantize(latents)[2][2].equal(expected)


def test_every_class_of_the_installed_version_is_known():
    assert {c.path: differs(c) for c in interop.CLIENTS.values() if differs(c)} == {}
