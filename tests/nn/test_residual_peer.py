"""ResidualVQ and GroupedResidualVQ beside vector-quantize-pytorch's: the same state, input and random choices."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as peer
from peers import assert_agree, observe, tensors
from test_graphs import NoHostSync
from torch import nn

import fastvq

DIM, CODES, STAGES, BATCH, LENGTH = 6, 13, 3, 3, 17
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
MASK = torch.arange(LENGTH) < torch.tensor([[5], [LENGTH], [1]])


def twins(name: str = "ResidualVQ", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and the peer's, with equal codes, well separated and finer from stage to stage, and equal weights."""
    options = {"dim": DIM, "codebook_size": CODES, "num_quantizers": STAGES} | options
    layers = []
    strict = {"strict_compat": options.get("beam_size") is not None}  # there only the first stage of beams learns
    for package, extra in ((fastvq, strict), (peer, {})):
        torch.manual_seed(1)
        layers.append(getattr(package, name)(**copy.deepcopy(options), **extra))
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    if not options.get("kmeans_init"):
        for group in getattr(theirs, "rvqs", [theirs]):
            for number, layer in enumerate(group.layers):
                codes = torch.randn(layer._codebook.embed.shape) * 0.7**number
                codes = nn.functional.normalize(codes, dim=-1) if options.get("use_cosine_sim") else codes
                layer._codebook.embed.data.copy_(codes)
                layer._codebook.embed_avg.copy_(codes)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def compare(
    layers: tuple[nn.Module, nn.Module], steps: int = 3, shape: Any = (BATCH, LENGTH, DIM), **call: Any
) -> None:
    """Fails unless both do the same in training, step by step, parameters descending too, and then in eval mode."""
    for number in range(steps + 1):
        if number == steps:  # the peer's loss keeps asking for a gradient in eval mode, ahead of that of the codes
            call.pop("return_all_codes", None)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        found = []
        for layer in layers:
            layer.train(number < steps)
            found.append(observe(layer, x, **call))
            with torch.no_grad():
                for parameter in layer.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.01)
        assert_agree(*found)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "straight-through": {"rotation_trick": False, "commitment_weight": 0.3, "decay": 0.9},
    "no commitment": {"commitment_weight": 0.0},
    "projected": {"codebook_dim": 4},
    "sizes": {"codebook_size": (13, 7, 5), "num_quantizers": None},
    "cosine": {"use_cosine_sim": True},
    "learnable": LEARNABLE,
    "learnable, straight-through": LEARNABLE | {"rotation_trick": False},
    "in place": LEARNABLE | {"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1)},
    "dead codes": {"threshold_ema_dead_code": 2},
    "shared": {"shared_codebook": True},
    "shared, straight-through": {"shared_codebook": True, "rotation_trick": False},
    "shared, learnable": {"shared_codebook": True} | LEARNABLE,
    "gradient between stages": {"quant_grad_frac": 0.4},
    "orthogonal": {"orthogonal_reg_weight": 0.3},
    "QINCo": {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 5, "depth": 2}},
    "QINCo, projected": {"implicit_neural_codebook": True, "codebook_dim": 4},
    "dropout": {"quantize_dropout": True},
    "dropout, structured": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2, "num_quantizers": 4},
    "dropout, cut off": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "shared_codebook": True},
    "beams": {"beam_size": 3},
    "beams, straight-through": {"beam_size": 4, "eval_beam_size": 2, "rotation_trick": False},
    "beams, weighted": {"beam_size": 3, "beam_score_quantizer_weights": [1.0, 0.5, 2.0], "codebook_dim": 4},
    "beams, shared": {"beam_size": 3, "shared_codebook": True},
    "beams, dropout": {"beam_size": 2, "quantize_dropout": True},
}


@pytest.mark.parametrize("key", OPTIONS)
def test_steps(key: str) -> None:
    compare(twins(**OPTIONS[key]), return_all_codes="beams" not in key)


@pytest.mark.parametrize("key", ["default", "projected", "cosine", "learnable", "QINCo", "dropout", "beams", "shared"])
@pytest.mark.parametrize("zeros", [True, False])
def test_masks(key: str, zeros: bool) -> None:
    layers = twins(**OPTIONS[key] | {"return_zeros_for_masked_padding": zeros})
    if key == "cosine":
        for layer in layers[0].layers:
            layer.strict_compat = True  # the peer's loss of masked rows, which are not normalised
    compare(layers, mask=MASK)


@pytest.mark.parametrize("key", ["default", "projected", "dropout", "shared", "QINCo", "beams", "learnable"])
def test_groups(key: str) -> None:
    layers = twins("GroupedResidualVQ", **OPTIONS[key] | {"dim": 2 * DIM, "groups": 2})
    compare(layers, shape=(BATCH, LENGTH, 2 * DIM), mask=MASK if key == "default" else None)


def test_single_tokens_frozen_and_fixed_dropout() -> None:
    compare(twins(), shape=(11, DIM))
    compare(twins(), freeze_codebook=True)
    for seed in range(4):
        compare(twins(quantize_dropout=True), steps=1, rand_quantize_dropout_fixed_seed=seed)


def test_diveq() -> None:
    """Noise is drawn once a step, in training alone."""
    ours, theirs = twins(diveq=True)
    x = torch.randn(BATCH, LENGTH, DIM)
    assert_agree(observe(ours, x), observe(theirs, x))
    quantized, indices, _ = ours.eval()(x)
    assert torch.equal(quantized, ours.get_output_from_indices(indices))


def test_kmeans() -> None:
    """Each stage starts from the k-means of what the ones before have left."""
    layers = twins(kmeans_init=True, codebook_size=5)
    x = torch.randn(BATCH, 4 * LENGTH, DIM)
    found = []
    for layer in layers:
        torch.manual_seed(4)
        found.append(dict(tensors("out", layer.eval()(x))))
    assert_agree(*found, rtol=1e-3)


@pytest.mark.parametrize("key", ["default", "projected", "sizes", "QINCo", "dropout", "shared"])
def test_decoding(key: str) -> None:
    ours, theirs = twins(**OPTIONS[key])
    indices = torch.randint(0, 5, (BATCH, 4, STAGES))
    indices[0, :, 1:] = -1
    found = [
        dict(tensors("out", (m.get_codes_from_indices(indices), m.get_output_from_indices(indices), m.codebooks)))
        for m in (ours, theirs)
    ]
    assert_agree(*({name: value.detach() for name, value in part.items()} for part in found))
    x = torch.randn(BATCH, LENGTH, DIM)
    quantized, index, _ = ours.eval()(x)
    torch.testing.assert_close(ours.get_output_from_indices(index), quantized, rtol=1e-5, atol=1e-6)
    if key == "dropout":
        assert_agree(*({"codes": m.get_codes_from_indices(indices[..., :2])} for m in (ours, theirs)))


@pytest.mark.parametrize("layout", ["image", "volume", "channels first"])
@pytest.mark.parametrize("name", ["ResidualVQ", "GroupedResidualVQ"])
def test_layouts_are_that_of_tokens(name: str, layout: str) -> None:
    """What crashes there: the output is that of the same tokens, in the layout of the input."""
    flags = {"image": "accept_image_fmap", "volume": "accept_3d_fmap"}
    option = {flags[layout]: True} if layout in flags else {"channel_last": False}
    sizes = {"image": (3, 5), "volume": (2, 3, 5), "channels first": (15,)}[layout]
    found = []
    x = torch.randn(BATCH, *sizes, DIM)
    for options in ({}, option):
        torch.manual_seed(0)
        groups = {"groups": 2, "codebook_dim": 2} if name.startswith("Grouped") else {"codebook_dim": 4}
        layer = getattr(fastvq, name)(dim=DIM, num_quantizers=STAGES, codebook_size=CODES, **groups, **options)
        given = x.movedim(-1, 1) if options else x.flatten(1, -2)
        quantized, indices, losses = layer(given)
        if options:
            assert quantized.shape == given.shape
            decoded = layer.get_output_from_indices(indices)
            assert decoded.shape == given.shape
            quantized = quantized.movedim(1, -1).flatten(1, -2)
            indices = indices.flatten(-1 - len(sizes), -2)
        found.append({"quantized": quantized.detach(), "indices": indices, "losses": losses.detach()})
    assert_agree(*found)


@pytest.mark.parametrize("name", ["ResidualVQ", "GroupedResidualVQ"])
def test_cross_entropy_to_given_indices(name: str) -> None:
    """Crashes there. Indices the layer finds itself are the likeliest; its loss falls with a step on it."""
    torch.manual_seed(0)
    layer = getattr(fastvq, name)(dim=DIM, num_quantizers=STAGES, codebook_size=CODES, **LEARNABLE)
    x = torch.randn(BATCH, LENGTH, DIM)
    _, found, _ = layer.eval()(x)
    other = (found + 1) % CODES
    quantized, own = layer(x, indices=found)
    assert quantized.shape == x.shape
    assert own.shape == ()
    assert own < layer(x, indices=other)[1]
    own = layer.train()(x, indices=found)[1]
    own.backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    with pytest.raises(ValueError, match="indices must not hold -1"):
        layer(x, indices=torch.full_like(found, -1))


def test_all_at_once_is_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path, and the loop that it stands for, bit for bit but for the sums of gradients."""
    for options in ({}, {"rotation_trick": False}, LEARNABLE, {"shared_codebook": True}, {"codebook_dim": 4}):
        results = []
        for fuses in (True, False):
            torch.manual_seed(0)
            layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=STAGES, codebook_size=CODES, **options)
            if not fuses:
                monkeypatch.setattr(layer, "_fuses", lambda call: False)
            x = torch.randn(BATCH, LENGTH, DIM)
            results.append([observe(layer, x), observe(layer, x), observe(layer.eval(), x, mask=MASK)])
        for fused, looped in zip(*results, strict=True):
            assert_agree(fused, looped, rtol=1e-6)
            assert torch.equal(fused["out.0"], looped["out.0"])


@pytest.mark.parametrize("options", [{}, LEARNABLE, {"threshold_ema_dead_code": 2}, {"freeze_codebook": True}], ids=str)
def test_dropout_without_a_host_is_dropout(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last stage is a tensor, stages past it leave no trace: the state, losses and gradients of an int."""
    options = {"dim": DIM, "num_quantizers": 3, "codebook_size": CODES, "quantize_dropout": True} | options
    layers = [fastvq.ResidualVQ(**options) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(BATCH, LENGTH, DIM)
    found = []
    for layer, last in zip(layers, (1, torch.tensor(1)), strict=True):
        monkeypatch.setattr(layer, "_last_stage", lambda device, seed, last=last: last)
        found.append(observe(layer, x))
    assert_agree(*found)


def test_beams_find_less_error_and_teach_every_stage() -> None:
    for options in ({}, {"implicit_neural_codebook": True, "mlp_kwargs": {"depth": 1}}):
        torch.manual_seed(0)
        layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=STAGES, codebook_size=CODES, **options)
        for stage in layer.layers:
            stage._codebook.embed.data.normal_()
        x = torch.randn(BATCH, LENGTH, DIM)
        greedy, wide = ((layer.eval()(x, beam_size=size)[0] - x).square().mean() for size in (1, CODES + 1))
        assert wide < greedy
        _, indices, _ = layer.train()(x, beam_size=3)
        for stage, index in zip(layer.layers, indices.unbind(-1), strict=True):
            assert torch.equal(stage._codebook.counts[0], index.flatten().bincount(minlength=CODES).float())


def test_frozen_by_the_constructor() -> None:
    """The peer's forward overrides it with its own default."""
    for strict in (False, True):
        layer = fastvq.ResidualVQ(
            dim=DIM, num_quantizers=2, codebook_size=5, freeze_codebook=True, strict_compat=strict
        )
        before = layer.codebooks.clone()
        layer(torch.randn(2, 9, DIM))
        assert torch.equal(layer.codebooks, before) != strict


@pytest.mark.parametrize("name", ["ResidualVQ", "GroupedResidualVQ"])
def test_arguments_are_the_peers(name: str) -> None:
    for owner in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(getattr(p, name), owner)).parameters for p in (fastvq, peer))
        names = [n for n in theirs if n not in ("vq_kwargs", "kwargs")]
        assert [n for n in ours if n in names] == names
        assert {n: ours[n].default or None for n in names} == {
            n: None if theirs[n].default in ({}, 0, False) else theirs[n].default for n in names
        }


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("heads must be 1", {"heads": 2}),
        ("num_quantizers is needed", {"num_quantizers": None}),
        ("codebook_size must have num_quantizers", {"codebook_size": (5, 7)}),
        ("codebook_size must be the same", {"codebook_size": (5, 7, 5), "shared_codebook": True}),
        ("eval_beam_size = 2 needs beam_size", {"eval_beam_size": 2}),
        ("beam_score_quantizer_weights must have", {"beam_score_quantizer_weights": [1.0]}),
        ("quantize_dropout_cutoff_index", {"quantize_dropout_cutoff_index": -1}),
    ],
)
def test_errors_name_the_argument(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        fastvq.ResidualVQ(**({"dim": DIM, "codebook_size": CODES, "num_quantizers": STAGES} | options))


def test_compiles_whole_and_exports() -> None:
    for options in ({}, {"quantize_dropout": True}):  # all stages at once; in turn, with the last one on the device
        torch.manual_seed(0)
        layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, **options)
        other = copy.deepcopy(layer)
        torch._dynamo.reset()
        x = torch.randn(2, 9, DIM)
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        found = observe(compiled, x)
        if "quantize_dropout" not in options:  # another draw there
            found = {key.replace("_orig_mod.", ""): value for key, value in found.items()}
            assert_agree(found, observe(layer, x))
        exported = torch.export.export(layer.eval(), (x,)).module()
        assert torch.equal(exported(x)[1], layer(x)[1])


@pytest.mark.parametrize("options", [{}, LEARNABLE], ids=["EMA", "learnable"])
def test_fixed_features(options: dict[str, Any]) -> None:
    """From an input without a gradient, the output trains the codes where they are learnable; backward always runs."""
    layers = twins(**options)
    x = torch.randn(BATCH, LENGTH, DIM)
    weights = torch.randn(BATCH, LENGTH, DIM)
    gradients: list[dict[str, Any]] = []
    for layer in layers:
        quantized, _, losses = layer(x)
        ((quantized * weights).sum() + losses.sum()).backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters()})
    assert_agree(*gradients)


def test_a_shared_codebook_and_its_optimizer() -> None:
    """One step at the end, on the errors of all stages; the peer's never steps."""
    torch.manual_seed(0)
    options = LEARNABLE | {"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1)}
    layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, shared_codebook=True, **options)
    codes = layer.codebooks[0].detach().clone().requires_grad_()
    x = torch.randn(BATCH, LENGTH, DIM)
    _, indices, _ = layer(x)
    residual, loss = x, torch.zeros(())
    for index in indices.unbind(-1):
        loss = loss + nn.functional.mse_loss(codes[index], residual)
        residual = residual - codes[index].detach()
    loss.backward()
    torch.testing.assert_close(layer.codebooks[1].detach(), (codes - 0.1 * codes.grad).detach())


@pytest.mark.parametrize("key", ["default", "QINCo", "beams", "shared", "cosine", "learnable"])
def test_nobody_waits_and_no_rows_do_no_harm(key: str) -> None:
    torch.manual_seed(0)
    layer = fastvq.ResidualVQ(**{"dim": DIM, "codebook_size": CODES, "num_quantizers": STAGES} | OPTIONS[key])
    x = torch.randn(BATCH, LENGTH, DIM)
    for training in (True, False):
        layer.train(training)
        for mask in (None, MASK):
            leaf = x.clone().requires_grad_()
            with NoHostSync():
                quantized, _, losses = layer(leaf, mask=mask)
                (leaf.sum() + quantized.sum() + losses.sum()).backward()
        quantized, indices, losses = layer(x[:0])
        assert (quantized.shape, indices.shape) == ((0, LENGTH, DIM), (0, LENGTH, STAGES))
        assert losses.isfinite().all()
    assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    for options, cast in (({"codebook_dim": 4}, False), ({}, False), ({}, True), (LEARNABLE, True)):
        layer = fastvq.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=CODES, **options)
        layer = layer.to(dtype) if cast else layer
        x = torch.randn(2, 9, DIM, dtype=dtype, requires_grad=True)
        quantized, indices, losses = layer(x)
        assert (quantized.dtype, indices.dtype) == (dtype, torch.int64)
        (quantized.sum() + losses.sum()).backward()
        assert x.grad.isfinite().all()
        assert layer.eval()(x)[0].dtype == dtype
