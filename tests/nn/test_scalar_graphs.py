"""The scalar quantisers compile whole, export, wait for no device, and take narrow dtypes and no rows at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peers import assert_agree, observe
from test_graphs import NoHostSync

import fastvq

LEVELS = {"levels": [8, 5, 5], "dim": 6}
BITS = {"codebook_size": 16, "dim": 6}
MASK = {"mask": torch.arange(11).expand(3, 11) < torch.tensor([[11], [0], [4]])}
DROPOUT = {"num_quantizers": 2, "quantize_dropout": True}
PLAIN = {"kmeans_init": False, "threshold_ema_dead_code": 0}
MODULES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FSQ": ("FSQ", LEVELS, {}),
    "FSQ symmetric": ("FSQ", LEVELS | {"preserve_symmetry": True, "orthogonal_rotation": False}, {}),
    "LFQ": ("LFQ", BITS | {"num_codebooks": 2, "commitment_loss_weight": 0.5}, {"return_loss_breakdown": True}),
    "LFQ spherical": ("LFQ", BITS | {"spherical": True, "soft_clamp_input_value": 2.0}, MASK),
    "LFQ sampled": ("LFQ", BITS | {"frac_per_sample_entropy": 0.5}, MASK),
    "ResidualFSQ": ("ResidualFSQ", LEVELS | {"num_quantizers": 2}, {"return_all_codes": True}),
    "ResidualFSQ dropout": ("ResidualFSQ", LEVELS | DROPOUT, {}),
    "ResidualLFQ": ("ResidualLFQ", BITS | {"num_quantizers": 2}, MASK),
    "ResidualLFQ dropout": ("ResidualLFQ", BITS | DROPOUT, {}),
    "GroupedResidualFSQ": ("GroupedResidualFSQ", LEVELS | {"num_quantizers": 1, "groups": 2}, {}),
    "GroupedResidualLFQ": ("GroupedResidualLFQ", BITS | {"num_quantizers": 1, "groups": 2}, {}),
    "FSP": ("FSP", LEVELS | {"quantize_rate": 0.5}, {}),
    "BinaryMapper": ("BinaryMapper", {"bits": 6}, {"return_indices": True}),
    "HierarchicalVQ": ("HierarchicalVQ", {"dim": 11, "codebook_size": 13, "scales": [1, 6]} | PLAIN, {}),
    "HierarchicalVQ dropout": (
        "HierarchicalVQ",
        {"dim": 11, "codebook_size": 13, "scales": [1, 3, 6], "nested_dropout": 0.9} | PLAIN,
        {"mask": torch.ones(3, 6, dtype=torch.bool)},
    ),
    "SimVQ": ("SimVQ", {"dim": 6, "codebook_size": 13}, {}),
    "ResidualSimVQ": ("ResidualSimVQ", {"dim": 6, "codebook_size": 13, "num_quantizers": 2}, {}),
    "RandomProjectionQuantizer": ("RandomProjectionQuantizer", {"dim": 6, "codebook_size": 13, "codebook_dim": 4}, {}),
    "LatentQuantize": ("LatentQuantize", {"levels": [8, 5, 5], "dim": 3}, {}),
}
INDICES_ALONE = "RandomProjectionQuantizer"
RANDOM = {"FSP", "BinaryMapper", "ResidualFSQ dropout", "ResidualLFQ dropout", "LFQ sampled", "HierarchicalVQ dropout"}


def build(key: str) -> tuple[torch.nn.Module, torch.Tensor, dict[str, Any]]:
    name, options, call = MODULES[key]
    torch.manual_seed(0)
    layer = getattr(fastvq, name)(**options)
    x = torch.randn(3, 3, 11) if name == "LatentQuantize" else torch.randn(3, 11, 6)
    return layer, x, call


@pytest.mark.parametrize("key", MODULES)
def test_compiles_whole_in_training(key: str) -> None:
    torch._dynamo.reset()
    plain, x, call = build(key)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    found, wanted = observe(compiled, x, **call), observe(plain, x, **call)
    if key not in RANDOM:  # drawn in another order
        assert_agree({name.replace("_orig_mod.", ""): value for name, value in found.items()}, wanted)


@pytest.mark.parametrize("key", [key for key in MODULES if key != "BinaryMapper"])
def test_exports_in_eval_mode(key: str) -> None:
    layer, x, call = build(key)
    layer.eval()
    exported = torch.export.export(layer, (x,), call).module()
    x = torch.randn(x.shape)
    torch.testing.assert_close(exported(x, **call), layer(x, **call))


@pytest.mark.parametrize("key", [key for key in MODULES if "dropout" not in key])
def test_no_host_synchronisation(key: str) -> None:
    """With dropout of stages the CPU may ask its own generator; `test_dropout_on_a_device` has the other way."""
    layer, x, call = build(key)
    for training in (True, False):
        layer.train(training)
        leaf = x.clone().requires_grad_()
        with NoHostSync():
            output = layer(leaf, **call)
            output = output[0] if isinstance(output[0], tuple) else output
            values = [value.sum() for value in output if isinstance(value, torch.Tensor) and value.requires_grad]
            torch.stack([leaf.sum(), *values]).sum().backward()


@pytest.mark.parametrize("key", ["ResidualFSQ dropout", "ResidualLFQ dropout"])
def test_dropout_on_a_device(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last stage that only the device knows gives what one does that the host knows."""
    layer, x, call = build(key)
    for last in range(2):
        results = []
        for drawn in (last, torch.tensor(last)):
            monkeypatch.setattr(layer, "_last_stage", lambda *_, drawn=drawn: drawn)
            results.append(observe(layer, x, **call))
        assert_agree(*results, rtol=1e-7)
        indices = results[0]["out.1"]
        assert (indices[..., : last + 1] >= 0).all()
        assert (indices[..., last + 1 :] == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("key", [k for k in MODULES if k not in {*RANDOM, "HierarchicalVQ", INDICES_ALONE}])
def test_dtypes(key: str, dtype: torch.dtype) -> None:
    """Outputs have the dtype of the input, whether the module has it too or autocast gives it."""
    layer, x, call = build(key)
    wanted = layer.eval()(x, **call)
    narrow = copy.deepcopy(layer).to(dtype)
    for training in (True, False):
        narrow.train(training)
        leaf = x.to(dtype).requires_grad_()
        output = narrow(leaf, **call)
        output = output[0] if isinstance(output[0], tuple) else output
        assert output[0].dtype == dtype
        if training:
            output[0].sum().backward()
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
    indices = output[1]
    same = (indices == (wanted[0] if isinstance(wanted[0], tuple) else wanted)[1]).float().mean()
    assert same > (0.999 if dtype == torch.float64 else 0.7)
    decode = getattr(narrow, "get_output_from_indices", None) or narrow.indices_to_codes
    torch.testing.assert_close(decode(indices), output[0], rtol=0.05, atol=0.05, check_dtype=False)
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype):
            output = layer.train()(x, **call)
        for value in [*(output[0] if isinstance(output[0], tuple) else output)][2:]:
            assert isinstance(value, torch.Tensor) is False or value.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_hierarchical_vq(dtype: torch.dtype) -> None:
    layer, x, _ = build("HierarchicalVQ")
    quantized, indices, loss = layer.to(dtype)(x.to(dtype))
    assert quantized.dtype == dtype
    assert loss.isfinite()
    torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("key", MODULES)
def test_no_rows(key: str) -> None:
    layer, x, call = build(key)
    call = {name: value[:0] if name == "mask" else value for name, value in call.items()}
    for training in (True, False):
        found = observe(layer.train(training), x[:0], **call)
        assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())
