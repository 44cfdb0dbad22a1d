"""transformers: each quantiser by itself, and in small models of its own configuration class."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from drop_in import check_drop_in, tensors
from torch import Tensor, nn

import fastvq
from fastvq.interop import transformers as interop
from fastvq.interop.patching import FastModule, differs
from fastvq.measure.agreement import compare_codes, compare_stages

Setting = types.SimpleNamespace


def client(model: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


@pytest.fixture(scope="module")
def higgs():
    """The module of the Higgs tokenizer, which imports torchaudio; its quantiser does not need it."""
    stand_in = types.ModuleType("torchaudio")
    sys.modules.setdefault("torchaudio", stand_in)
    yield importlib.import_module("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    if sys.modules["torchaudio"] is stand_in:
        del sys.modules["torchaudio"]


def fill(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Random parameters, and random codes in the buffers that hold them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
        for level, (name, buffer) in enumerate(module.named_buffers()):
            if name.endswith(("embed", "embed_sum")):
                buffer.normal_(0, scale * 0.95**level)
            if name.endswith("cluster_usage"):
                buffer.uniform_(0.5, 2)
    return module


CODEC = Setting(
    codebook_size=37, codebook_dim=8, frame_rate=50, num_quantizers=6, hidden_size=12, num_semantic_quantizers=1
)
RESIDUAL = {
    "encodec": ("encodec", "EncodecResidualVectorQuantizer", 8),
    "xcodec": ("xcodec", "XcodecResidualVectorQuantization", 8),
    "mimi": ("mimi", "MimiSplitResidualVectorQuantizer", 12),
}
CODEC.vector_quantization_hidden_dimension = 8


def codec(name: str) -> tuple[nn.Module, int]:
    model, cls, channels = RESIDUAL[name]
    return fill(client(model, cls)(CODEC)).eval(), channels


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual(name):
    module, channels = codec(name)
    for batch, frames in [(1, 1), (3, 7), (2, 41)]:
        x = torch.randn(batch, channels, frames)
        report = check_drop_in(module, lambda m, x=x: m.encode(x))
        assert len(report.done) == 6 + (2 if name == "mimi" else 1)
        assert not report.left_alone
    with torch.inference_mode():
        expected = module.encode(x)
    fastvq.patch(module)
    with torch.inference_mode():
        assert module.encode(x).equal(expected)
    assert module.encode(x).equal(expected)
    assert module.encode(x).is_contiguous()


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_residual_in_other_dtypes(name, dtype):
    """float64 in one call; narrow dtypes stage by stage, as their residuals are rounded; the nearest code."""
    module, channels = codec(name)
    module.to(dtype)
    x = torch.randn(2, channels, 33, dtype=dtype)
    latents = x
    if name == "mimi":
        module = module.acoustic_residual_vector_quantizer
        latents = module.input_proj(x)
    expected = module.encode(x)
    fastvq.patch(module)
    found = module.encode(x)
    codebooks = [s.codebook.embed for s in getattr(module, "layers", None) or module.quantizers]
    rows = latents.detach().transpose(1, 2).flatten(0, 1)
    result = compare_stages(rows, codebooks, expected.flatten(1), found.flatten(1))
    assert result.unexplained == 0, result
    for codebook, codes in zip(codebooks, found.flatten(1), strict=True):
        assert codes.equal(fastvq.search(rows, codebook, backend="reference"))
        rows = rows - codebook[codes]


def test_fewer_stages():
    module, channels = codec("encodec")
    x = torch.randn(2, channels, 9)
    check_drop_in(module, lambda m: m.encode(x, bandwidth=0.6))
    mimi, channels = codec("mimi")
    x = torch.randn(2, channels, 9)
    check_drop_in(mimi, lambda m: m.encode(x, num_quantizers=4))
    check_drop_in(mimi, lambda m: m.encode(x, num_quantizers=1))


@pytest.mark.parametrize("name", RESIDUAL)
def test_codes_that_change_are_seen(name):
    module, channels = codec(name)
    x = torch.randn(2, channels, 41)
    fastvq.patch(module)
    module.encode(x)
    for buffer in module.buffers():
        if buffer.dim() == 2:
            buffer.data.neg_()  # past the version counter
    for part in module.modules():
        if hasattr(part, "_embed"):
            part._embed = None  # the client's own copy of its codes, which it never makes anew
    found = module.encode(x)
    fastvq.unpatch(module)
    assert found.equal(module.encode(x))


def test_a_stage_of_another_class_is_asked_itself():
    module, channels = codec("encodec")
    x = torch.randn(2, channels, 9)

    class Other(client("encodec", "EncodecVectorQuantization")):
        def encode(self, hidden_states: Tensor) -> Tensor:
            return torch.zeros_like(super().encode(hidden_states))

    module.layers[2].__class__ = Other
    expected = module.encode(x)
    fastvq.patch(module)
    assert module.encode(x).equal(expected)
    assert not expected[2].any()


def test_higgs(higgs):
    setting = Setting(codebook_size=37, codebook_dim=8, frame_rate=50, num_quantizers=3, hidden_size=12)
    module = fill(higgs.HiggsAudioV2TokenizerResidualVectorQuantization(setting)).eval()
    x = torch.randn(2, 12, 9)
    report = check_drop_in(module, lambda m: m.encode(x))
    assert len(report.done) == 3


def test_dac():
    setting = Setting(
        hidden_size=12, codebook_dim=8, codebook_size=37, n_codebooks=4, quantizer_dropout=0.5, num_codebooks=4
    )
    module = fill(client("dac", "DacResidualVectorQuantizer")(setting))
    x = torch.randn(4, 12, 23)
    for training in (False, True):
        report = check_drop_in(module.train(training), lambda m: m(x))
        assert len(report.done) == 4
    check_drop_in(module.eval(), lambda m: m(x, n_quantizers=2))


IMAGE = Setting(num_embeddings=37, codebook_size=37, embed_dim=6, beta=0.3, num_patches=4)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("chameleon", "ChameleonVQVAEVectorQuantizer"),
        ("janus", "JanusVQVAEVectorQuantizer"),
        ("glm_image", "GlmImageVQVAEVectorQuantizer"),
        ("emu3", "Emu3VQVAEVectorQuantizer"),
    ],
)
def test_images(model, name):
    module = client(model, name)(IMAGE)
    nn.init.normal_(module.embedding.weight)
    shape = (2, 3, 6, 5, 4) if model == "emu3" else (2, 6, 5, 4)
    x = torch.randn(shape, requires_grad=True)
    for training in (False, True):
        assert check_drop_in(module.train(training), lambda m: m(x)).done
    grads = []
    for _ in range(2):
        x.grad = None
        if model != "emu3":
            quantized, loss, _ = module(x)
            (quantized.square().sum() + loss).backward()
            grads.append(x.grad)
        fastvq.patch(module)
    assert all(g.equal(grads[0]) for g in grads)


@pytest.mark.parametrize(
    ("model", "name", "masked"),
    [
        ("wav2vec2", "Wav2Vec2GumbelVectorQuantizer", True),
        ("wav2vec2_conformer", "Wav2Vec2ConformerGumbelVectorQuantizer", True),
        ("wavlm", "WavLMGumbelVectorQuantizer", False),
        ("unispeech", "UniSpeechGumbelVectorQuantizer", False),
        ("unispeech_sat", "UniSpeechSatGumbelVectorQuantizer", False),
    ],
)
def test_gumbel(model, name, masked):
    setting = Setting(
        num_codevector_groups=2, num_codevectors_per_group=13, codevector_dim=10, conv_dim=(7,), hidden_size=7
    )
    module = fill(client(model, name)(setting))
    x = torch.randn(3, 17, 7)
    masks = [None, torch.rand(3, 17) < 0.4] if masked else [None]
    for training in (False, True):
        module.train(training)
        for mask in masks:
            arguments = (x,) if mask is None else (x, mask)
            check_drop_in(module, lambda m, arguments=arguments: m(*arguments), rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float64):
        module.eval().to(dtype)
        narrow = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
        check_drop_in(module, lambda m, dtype=dtype: m(x.to(dtype)), **narrow)


def test_every_class_of_the_installed_version_is_known(higgs):
    assert {c.path: differs(c) for c in interop.CLIENTS.values() if differs(c)} == {}


@pytest.fixture
def registered():
    names = interop.register()
    yield names
    interop.unregister()


def small_encodec() -> Any:
    from transformers import EncodecConfig

    return EncodecConfig(num_filters=2, num_lstm_layers=1, codebook_size=16, hidden_size=8, upsampling_ratios=[4, 2])


def test_register(registered, tmp_path):
    from transformers import AutoModel, EncodecModel
    from transformers.monkey_patching import get_patch_mapping

    assert "EncodecResidualVectorQuantizer" in registered
    assert len(set(registered)) >= 16
    plain = EncodecModel(small_encodec()).eval()
    for layer in plain.quantizer.layers:
        layer.codebook.embed.normal_()
    assert not isinstance(plain.quantizer, FastModule)  # a bare constructor
    plain.save_pretrained(tmp_path)
    x = torch.randn(2, 1, 400)
    expected = plain.encode(x, bandwidth=6.0).audio_codes
    for model in (EncodecModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(model, EncodecModel)
        assert isinstance(model.quantizer, FastModule)
        assert isinstance(model.quantizer, client("encodec", "EncodecResidualVectorQuantizer"))
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert model.eval().encode(x, bandwidth=6.0).audio_codes.equal(expected)
        assert fastvq.unpatch(model).done
    assert isinstance(AutoModel.from_config(small_encodec()).quantizer, FastModule)
    interop.register()  # twice is as once
    interop.unregister()
    assert not any("Encodec" in pattern for pattern in get_patch_mapping())
    assert not isinstance(AutoModel.from_config(small_encodec()).quantizer, FastModule)
    interop.unregister()


def test_compiles():
    module, channels = codec("encodec")
    x = torch.randn(2, channels, 9)
    expected = module.encode(x)
    fastvq.patch(module)
    encode = torch.compile(module.encode, fullgraph=True, backend="aot_eager")
    assert encode(x).equal(expected)


def test_a_model_by_its_configuration():
    from transformers import MimiConfig, MimiModel

    config = MimiConfig(
        num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=8, vector_quantization_hidden_dimension=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8, intermediate_size=16,
        num_quantizers=4, upsampling_ratios=[4, 2], upsample_groups=16,
    )  # fmt: skip
    model = MimiModel(config).eval()
    fill(model.quantizer)
    x = torch.randn(2, 1, 640)
    with torch.no_grad():
        expected = model.encode(x).audio_codes
        report = fastvq.patch(model)
        assert model.encode(x).audio_codes.equal(expected)
    assert len(report.done) == 6
    assert next(tensors(expected.unbind())).dtype == torch.int64


def test_compare_codes_tells_wrong_from_rounding():
    rows, codebook = torch.randn(100, 8), torch.randn(50, 8)
    nearest = fastvq.search(rows, codebook)
    wrong = nearest.clone()
    wrong[3] = (wrong[3] + 1) % 50
    assert compare_codes(rows, codebook, nearest, nearest).different == 0
    assert compare_codes(rows, codebook, wrong, nearest).unexplained == 1
    assert compare_codes(rows, codebook, nearest, wrong).unexplained == 1
    twins = torch.cat([codebook, codebook + 1e-7])
    nearest = fastvq.search(rows, twins)
    result = compare_codes(rows, twins, (nearest + 50) % 100, nearest)
    assert (result.different, result.unexplained) == (100, 0)
