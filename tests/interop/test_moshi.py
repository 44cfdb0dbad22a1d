"""moshi: the residual quantisers of its Mimi."""

from __future__ import annotations

import copy

import pytest
import torch
from drop_in import assert_same_result, check_drop_in
from unpacked import import_alone

import fastvq
from fastvq.interop.patching import differs, library


@pytest.fixture
def quantizer():
    vq = import_alone("moshi.quantization.vq")
    module = vq.SplitResidualVectorQuantizer(
        n_q=5, n_q_semantic=1, dimension=8, input_dimension=12, output_dimension=12, bins=37
    )
    for level, (name, buffer) in enumerate(module.named_buffers()):
        if name.endswith("embedding_sum"):
            buffer.normal_(0, 0.95**level)
        if name.endswith("cluster_usage"):
            buffer.uniform_(0.5, 2)
        if name.endswith("_initialized"):
            buffer.fill_(1)
    return module.eval()


def test_encode_and_decode(quantizer):
    for frames in (1, 23):
        x = torch.randn(2, 12, frames)
        quantizer.encode(x)  # the client makes and keeps its codes
        report = check_drop_in(quantizer, lambda m, x=x: (m.encode(x), m.decode(m.encode(x))))
        assert len(report.done) == 7
    result = quantizer(x, 12)
    fastvq.patch(quantizer)
    found = quantizer(x, 12)
    assert_same_result((found.x, found.codes, found.penalty), (result.x, result.codes, result.penalty))


def test_fewer_stages(quantizer):
    x = torch.randn(2, 12, 9)
    quantizer.set_num_codebooks(3)
    quantizer.encode(x)
    check_drop_in(quantizer, lambda m: m.encode(x))


def test_training_goes_on(quantizer):
    twin = copy.deepcopy(quantizer).train()
    fastvq.patch(quantizer)
    quantizer.train()
    for step in range(6):
        x = torch.randn(2, 12, 40)
        results = []
        for module in (quantizer, twin):
            torch.manual_seed(step)
            result = module(x, 12)
            results.append((result.x, result.codes, result.penalty))
        assert_same_result(*results, rtol=1e-5, atol=1e-5)
    assert_same_result(quantizer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-5)
    for module in (quantizer, twin):
        module.eval()
    assert quantizer.encode(x).equal(twin.encode(x))  # the codes that it has learned


def test_every_class_of_the_installed_version_is_known():
    import_alone("moshi.quantization.core_vq")
    assert [differs(c) for c in library("moshi").CLIENTS.values()] == [None, None]
