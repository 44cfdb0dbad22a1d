"""The scalar quantisers against vector-quantize-pytorch: arguments, state, outputs, losses, gradients, decoding."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as peer
from peers import assert_agree, observe, twins
from torch import nn

import fastvq

TRANSFORM = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
# Without what is drawn at random, and at which the peer's draws differ.
HIERARCHY = {"dim": 6, "codebook_size": 13, "scales": [1, 3, 11], "kmeans_init": False, "threshold_ema_dead_code": 0}
TOKENS, FIRST, IMAGE, VIDEO = (3, 11, 6), (3, 6, 11), (2, 6, 5, 3), (2, 6, 2, 3, 4)

# class, constructor, shape of the input, forward
Case = tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any]]
CASES: list[Case] = [
    ("FSQ", {"levels": [8, 5, 5, 7, 3, 4]}, TOKENS, {}),
    ("FSQ", {"levels": (8, 5, 5), "dim": 6}, TOKENS, {}),
    ("FSQ", {"levels": [8, 5, 5], "dim": 6, "projection_has_bias": False}, IMAGE, {}),
    ("FSQ", {"levels": [8, 5, 5], "num_codebooks": 2}, VIDEO, {}),
    ("FSQ", {"levels": [4, 3], "num_codebooks": 5, "dim": 6}, TOKENS, {}),
    ("FSQ", {"levels": [6, 5, 7], "dim": 6, "keep_num_codebooks_dim": True}, TOKENS, {}),
    ("FSQ", {"levels": [8, 5, 5], "dim": 6, "channel_first": True}, FIRST, {}),
    ("FSQ", {"levels": [8, 5, 5], "dim": 6, "channel_first": True}, (3, 6), {}),
    ("FSQ", {"levels": [8, 5, 5], "dim": 6, "return_indices": False}, TOKENS, {}),
    ("FSQ", {"levels": [2, 3, 8], "dim": 6, "preserve_symmetry": True}, TOKENS, {}),
    ("FSQ", {"levels": [4, 3, 8], "dim": 6, "preserve_symmetry": True, "bound_hard_clamp": True}, TOKENS, {}),
    ("FSQ", {"levels": [4, 3, 8], "dim": 6, "preserve_symmetry": True, "noise_dropout": 0.5}, TOKENS, {}),
    ("FSQ", {"levels": [8, 5, 5], "dim": 6, "bound_hard_clamp": True}, TOKENS, {}),
    ("FSQ", {"levels": [5, 5, 5], "dim": 6, "orthogonal_rotation": True}, TOKENS, {}),
    ("FSQ", {"levels": [8, 5, 5], "dim": 6, "force_quantization_f32": False}, TOKENS, {}),
    ("ResidualFSQ", {"levels": [8, 5, 5], "dim": 6, "num_quantizers": 3}, TOKENS, {"return_all_codes": True}),
    ("ResidualFSQ", {"levels": [8, 5, 5, 5, 5, 5], "num_quantizers": 3}, TOKENS, {}),
    ("ResidualFSQ", {"levels": [4, 5], "dim": 6, "num_quantizers": 3, "bound_hard_clamp": False}, TOKENS, {}),
    (
        "ResidualFSQ",
        {"levels": [4, 5], "dim": 6, "num_quantizers": 3, "bound_hard_clamp": False, "soft_clamp_input_value": 1.5},
        TOKENS,
        {},
    ),
    ("ResidualFSQ", {"levels": [8, 5, 5], "dim": 6, "num_quantizers": 3, "is_channel_first": True}, IMAGE, {}),
    ("ResidualFSQ", {"levels": [4, 4], "dim": 6, "num_quantizers": 2, "noise_dropout": 0.2}, TOKENS, {}),
    ("GroupedResidualFSQ", {"levels": [8, 5], "dim": 6, "num_quantizers": 3, "groups": 2}, TOKENS, {}),
    (
        "GroupedResidualFSQ",
        {"levels": [8, 5], "dim": 6, "num_quantizers": 3, "groups": 3},
        TOKENS,
        {"return_all_codes": True},
    ),
    ("LFQ", {"dim": 6}, TOKENS, {}),
    ("LFQ", {"dim": 6, "codebook_size": 512}, TOKENS, {"return_loss_breakdown": True}),
    ("LFQ", {"dim": 6, "codebook_size": 8}, IMAGE, {"return_loss_breakdown": True, "inv_temperature": 1.0}),
    ("LFQ", {"dim": 6, "codebook_size": 8, "num_codebooks": 2}, VIDEO, {"inv_temperature": 5.0}),
    ("LFQ", {"dim": 6, "codebook_size": 16, "num_codebooks": 3}, TOKENS, {"return_loss_breakdown": True}),
    ("LFQ", {"dim": 6, "keep_num_codebooks_dim": True}, TOKENS, {}),
    ("LFQ", {"dim": 6, "channel_first": True}, FIRST, {}),
    ("LFQ", {"dim": 6, "commitment_loss_weight": 0.5, "diversity_gamma": 2.5}, TOKENS, {"return_loss_breakdown": True}),
    ("LFQ", {"dim": 6, "commitment_loss_weight": 0.5}, TOKENS, {"mask": "mask", "return_loss_breakdown": True}),
    ("LFQ", {"dim": 6, "frac_per_sample_entropy": 0.4}, TOKENS, {"return_loss_breakdown": True}),
    ("LFQ", {"dim": 6, "entropy_loss_weight": 2.0, "codebook_scale": 0.5}, TOKENS, {"inv_temperature": 3.0}),
    ("LFQ", {"dim": 6, "straight_through_activation": nn.Tanh()}, TOKENS, {}),
    ("LFQ", {"dim": 6, "has_projections": True, "projection_has_bias": False}, TOKENS, {}),
    ("LFQ", {"dim": 6, "soft_clamp_input_value": 2.0}, TOKENS, {}),
    ("LFQ", {"dim": 6, "codebook_size": 16, "cosine_sim_project_in": True}, TOKENS, {"inv_temperature": 10.0}),
    (
        "LFQ",
        {"dim": 6, "codebook_size": 16, "cosine_sim_project_in": True, "cosine_sim_project_in_scale": 2.0},
        TOKENS,
        {"inv_temperature": 10.0},
    ),
    ("LFQ", {"dim": 6, "experimental_softplus_entropy_loss": True, "entropy_loss_offset": 3.0}, TOKENS, {}),
    ("LFQ", {"dim": 6, "spherical": True, "commitment_loss_weight": 1.0}, TOKENS, {"inv_temperature": 20.0}),
    ("LFQ", {"dim": 6, "spherical": True, "codebook_scale": 2.0, "codebook_size": 32}, TOKENS, {}),
    ("LFQ", {"dim": 6, "orthogonal_rotation": True}, TOKENS, {}),
    ("LFQ", {"dim": 6, "force_quantization_f32": False}, TOKENS, {}),
    ("ResidualLFQ", {"dim": 6, "codebook_size": 16, "num_quantizers": 3}, TOKENS, {"return_all_codes": True}),
    ("ResidualLFQ", {"dim": 6, "codebook_size": 64, "num_quantizers": 3}, IMAGE, {}),
    ("ResidualLFQ", {"dim": 6, "codebook_size": 64, "num_quantizers": 2, "commitment_loss_weight": 1.0}, TOKENS, {}),
    ("ResidualLFQ", {"dim": 6, "codebook_size": 64, "num_quantizers": 3}, TOKENS, {"mask": "mask"}),
    ("ResidualLFQ", {"dim": 6, "codebook_size": 16, "num_quantizers": 3, "soft_clamp_input_value": 3.0}, TOKENS, {}),
    ("GroupedResidualLFQ", {"dim": 6, "codebook_size": 16, "num_quantizers": 3, "groups": 2}, TOKENS, {}),
    (
        "GroupedResidualLFQ",
        {"dim": 6, "codebook_size": 8, "num_quantizers": 2, "groups": 2},
        TOKENS,
        {"return_all_codes": True, "mask": "mask"},
    ),
    (
        "GroupedResidualLFQ",
        {"dim": 6, "codebook_size": 8, "num_quantizers": 2, "groups": 2, "accept_image_fmap": True},
        IMAGE,
        {},
    ),
    ("FSP", {"levels": [8, 5, 5, 7, 3, 4]}, TOKENS, {}),
    ("FSP", {"levels": [8, 5, 5], "dim": 6, "need_inv_act": True, "quantize_rate": 0.5}, TOKENS, {}),
    ("FSP", {"levels": [8, 5, 5], "dim": 6, "channel_first": True, "projection_has_bias": False}, IMAGE, {}),
    *(
        ("FSP", {"levels": [8, 5], "dim": 6, "act_name": act, "vector_norm": norm, "need_inv_act": True}, TOKENS, {})
        for act, norm in (
            *(("tanh", "none"), ("sigmoid", "var_sigmoid"), ("normal", "var"), ("laplace", "var_laplace")),
            ("cauchy", "kurt"),
        )
    ),
    ("FSP", {"levels": [8, 5], "dim": 6, "quantize_rate": 1.0}, TOKENS, {"eps": 1e-3}),
    ("BinaryMapper", {"bits": 6}, TOKENS, {}),
    ("BinaryMapper", {"bits": 6, "kl_loss_threshold": 0.1}, (*IMAGE[:1], 6), {"return_indices": True}),
    ("BinaryMapper", {"bits": 6}, TOKENS, {"temperature": 0.3, "reduce_aux_kl_loss": False, "return_indices": True}),
    ("BinaryMapper", {"bits": 6}, TOKENS, {"straight_through": True, "calc_aux_loss": True, "deterministic": True}),
    ("BinaryMapper", {"bits": 6, "deterministic_on_eval": True}, TOKENS, {}),
    ("SimVQ", {"dim": 6, "codebook_size": 13}, TOKENS, {}),
    ("SimVQ", {"dim": 6, "codebook_size": 13, "rotation_trick": False, "frozen_codebook_dim": 4}, TOKENS, {}),
    ("SimVQ", {"dim": 6, "codebook_size": 13, "channel_first": True, "commitment_weight": 0.3}, IMAGE, {}),
    ("SimVQ", {"dim": 6, "codebook_size": 13, "input_to_quantize_commit_loss_weight": 2.0}, TOKENS, {}),
    ("SimVQ", {"dim": 6, "codebook_size": 80}, TOKENS, {}),  # more codes than rows
    ("SimVQ", {"dim": 6, "codebook_size": 80, "frozen_codebook_dim": 4, "commitment_weight": 0.3}, TOKENS, {}),
    ("SimVQ", {"dim": 6, "codebook_size": 80, "rotation_trick": False, "channel_first": True}, IMAGE, {}),
    (
        "SimVQ",
        {
            "dim": 6,
            "codebook_size": 13,
            "codebook_transform": nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)),
        },
        TOKENS,
        {},
    ),
    ("ResidualSimVQ", {"dim": 6, "codebook_size": 13, "num_quantizers": 3}, TOKENS, {"return_all_codes": True}),
    ("ResidualSimVQ", {"dim": 6, "codebook_size": 80, "num_quantizers": 3}, TOKENS, {}),
    (
        "ResidualSimVQ",
        {"dim": 6, "codebook_size": 13, "num_quantizers": 3, "rotation_trick": False, "channel_first": True},
        FIRST,
        {"return_all_codes": True},
    ),
    ("HierarchicalVQ", HIERARCHY, FIRST, {}),
    ("HierarchicalVQ", HIERARCHY | {"channel_first": False, "share_quant_resi": 2}, TOKENS, {"lens": "lens"}),
    ("HierarchicalVQ", HIERARCHY | {"share_quant_resi": 0, "rotation_trick": True}, FIRST, {"mask": "mask"}),
    (
        "HierarchicalVQ",
        HIERARCHY | {"scales": [1, (2, 3), (5, 3)], "accept_image_fmap": True, "quant_resi": 0.0},
        IMAGE,
        {},
    ),
    (
        "HierarchicalVQ",
        HIERARCHY | {"scales": [1, 2], "codebook_size": (5, 9), "shared_codebook": False, "accept_3d_fmap": True},
        VIDEO,
        {},
    ),
    ("HierarchicalVQ", HIERARCHY | {"nested_dropout": 0.7, "nested_dropout_min_levels": 2}, FIRST, {}),
    ("RandomProjectionQuantizer", {"dim": 6, "codebook_size": 13, "codebook_dim": 4}, TOKENS, {}),
    ("RandomProjectionQuantizer", {"dim": 6, "codebook_size": 13, "codebook_dim": 4, "norm": False}, TOKENS, {}),
    ("RandomProjectionQuantizer", {"dim": 6, "codebook_size": 13, "codebook_dim": 4, "num_codebooks": 3}, TOKENS, {}),
    ("LatentQuantize", {"levels": [5, 5, 8, 3, 7, 4], "dim": 6}, FIRST, {}),
    ("LatentQuantize", {"levels": [5, 5, 8], "dim": 6}, IMAGE, {}),
    ("LatentQuantize", {"levels": 5, "dim": 6, "codebook_dim": 4}, (3, 6), {}),
    ("LatentQuantize", {"levels": [5, 8], "dim": 6, "num_codebooks": 2, "commitment_loss_weight": 0.0}, FIRST, {}),
    (
        "LatentQuantize",
        {"levels": [5, 8], "dim": 6, "optimize_values": False, "quantization_loss_weight": 0},
        FIRST,
        {},
    ),
]
DECODING = {"FSQ", "LFQ", "FSP", "LatentQuantize", "SimVQ"}
NAMES = sorted({case[0] for case in CASES} | {"EvoLFQ"})


def case_id(case: Case) -> str:
    name, options, _, call = case
    return ",".join([name, *(f"{key}={value}" for key, value in (options | call).items())])


def options_for_ours(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Where the peer is silently wrong in a loss or its gradient (docs/compat.md), strict_compat repeats it."""
    several = name == "RandomProjectionQuantizer" and "num_codebooks" in options
    return {"strict_compat": True} if several or name == "LatentQuantize" or "LFQ" in name else {}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_steps(case: Case, training: bool) -> None:
    name, options, shape, call = case
    ours, theirs = twins(name, ours_only=options_for_ours(name, options), **options)
    ours.train(training), theirs.train(training)
    call = dict(call)
    if call.get("mask") == "mask":
        call["mask"] = torch.arange(11) < torch.tensor([[4], [11], [0]])
    if call.get("lens") == "lens":
        call["lens"] = torch.tensor([4, 11, 0])
    for seed in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        judge = observe(copy.deepcopy(ours).double(), x.double(), **call) if "LFQ" in name else None
        assert_agree(observe(ours, x, **call), observe(theirs, x, **call), judge=judge)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[0] in {"FSQ", "LFQ", "FSP", "LatentQuantize", "SimVQ"}], ids=case_id
)
def test_indices_to_codes(case: Case) -> None:
    name, options, shape, _ = case
    if not options.get("return_indices", True):
        return
    ours, theirs = twins(name, **options)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        quantized, indices, *_ = ours(torch.randn(shape))
        decoded = ours.indices_to_codes(indices)
        torch.testing.assert_close(decoded, quantized, rtol=1e-4, atol=1e-5)
        if name != "LatentQuantize" or len(shape) > 2:  # whose peer cannot decode the indices of single tokens
            torch.testing.assert_close(decoded, theirs.indices_to_codes(indices), rtol=1e-4, atol=1e-5)
        for attribute in ("implicit_codebook", "codebook"):
            if hasattr(theirs, attribute):
                torch.testing.assert_close(getattr(ours, attribute), getattr(theirs, attribute), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "case", [c for c in CASES if "Residual" in c[0] and not c[1].get("is_channel_first")], ids=case_id
)
def test_residual_decoding(case: Case) -> None:
    name, options, shape, _ = case
    ours, theirs = twins(name, **options)
    ours.eval(), theirs.eval()
    image_groups = options.get("accept_image_fmap")  # the peer joins these in the wrong dimension
    with torch.no_grad():
        quantized, indices, *_ = ours(torch.randn(shape))
        codes = ours.get_codes_from_indices(indices)
        torch.testing.assert_close(codes, theirs.get_codes_from_indices(indices), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.codebooks, theirs.codebooks, rtol=1e-6, atol=1e-6)
        output = ours.get_output_from_indices(indices)
        last = output if image_groups or len(shape) == 3 else output.movedim(-1, 1)
        torch.testing.assert_close(last, quantized, rtol=1e-4, atol=1e-5)
        if not image_groups:
            torch.testing.assert_close(output, theirs.get_output_from_indices(indices), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ResidualFSQ", {"levels": [5, 5], "dim": 6}),
        ("ResidualLFQ", {"codebook_size": 8, "dim": 6}),
        ("ResidualFSQ", {"levels": [5, 5], "dim": 6, "quantize_dropout_cutoff_index": 2}),
        ("ResidualLFQ", {"codebook_size": 8, "dim": 6, "quantize_dropout_multiple_of": 2}),
        ("ResidualSimVQ", {"codebook_size": 8, "dim": 6}),
    ],
)
def test_dropout_of_stages(name: str, options: dict[str, Any], seed: int) -> None:
    ours, theirs = twins(name, num_quantizers=6, quantize_dropout=True, **options)
    x = torch.randn(TOKENS)
    for call in ({"rand_quantize_dropout_fixed_seed": seed}, {}):
        found = observe(ours, x, seed=seed, return_all_codes=True, **call)
        assert_agree(found, observe(theirs, x, seed=seed, return_all_codes=True, **call), dtypes=False)
    coarse = found["out.1"][..., :3]
    torch.testing.assert_close(ours.get_output_from_indices(coarse), theirs.get_output_from_indices(coarse))
    ours.eval()
    assert (ours(x)[1] >= 0).all()


@pytest.mark.parametrize("name", ["GroupedResidualFSQ", "GroupedResidualLFQ"])
def test_groups_drop_the_same_stages(name: str) -> None:
    size = {"levels": [5, 5]} if name.endswith("FSQ") else {"codebook_size": 8}
    ours, theirs = twins(name, dim=6, groups=2, num_quantizers=6, quantize_dropout=True, **size)
    for seed in range(4):
        x = torch.randn(TOKENS)
        assert_agree(observe(ours, x, seed=seed), observe(theirs, x, seed=seed), dtypes=False)


@pytest.mark.parametrize("is_sign", [False, True])
def test_evolution(is_sign: bool) -> None:
    ours, theirs = evolving()
    x = torch.randn(5, 6)
    assert_agree(observe(ours, x), observe(theirs, x))
    assert torch.equal(ours.encode(x, return_signs=is_sign), theirs.encode(x, return_signs=is_sign))
    populations = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        first = model.init_population_from_data(x, pop_size=12, is_sign=is_sign)
        fitness = lambda decoded, bits: -decoded.square().sum(-1)  # noqa: E731
        runs = model.evolve(fitness, first, generations=6, is_sign=is_sign, return_best_decoded=True, batch_size=5)
        populations.append(list(runs))
    for mine, other in zip(*populations, strict=True):
        assert torch.equal(mine.pop_bits, other.pop_bits)
        assert mine.best_fitness == pytest.approx(other.best_fitness)
        # The best gene has the best fitness, which cannot be said of the peer's.
        assert float(-mine.best_decoded.square().sum()) == pytest.approx(mine.best_fitness, rel=1e-5)
    for method, arguments in {
        "init_random_population": {"pop_size": 4, "shape": (6,), "is_sign": is_sign},
        "tournament_selection": {"population": first, "fitnesses": torch.arange(12.0)},
    }.items():
        found = []
        for model in (ours, theirs):
            torch.manual_seed(6)
            found.append(getattr(model, method)(**arguments))
        assert torch.equal(*found)


def evolving() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 8), nn.Linear(8, 6)
    return twins("EvoLFQ", encoder=encoder, decoder=decoder, codebook_size=256, pop_size=12, elitism_count=2)


def example(name: str, package: Any) -> nn.Module:
    if name == "EvoLFQ":
        return package.EvoLFQ(nn.Linear(6, 6), nn.Linear(6, 6), dim=6)
    return getattr(package, name)(**next(options for case, options, *_ in CASES if case == name))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_the_peers(name: str) -> None:
    for owner in ("__init__", "forward"):
        ours = dict(inspect.signature(getattr(getattr(fastvq, name), owner)).parameters)
        theirs = dict(inspect.signature(getattr(getattr(peer, name), owner)).parameters)
        ours.pop("strict_compat", None)
        assert list(ours) == list(theirs)
        for key, parameter in theirs.items():
            assert ours[key].kind == parameter.kind
            mine, other = ours[key].default, parameter.default
            same = type(mine) is type(other) if isinstance(other, nn.Identity) or callable(other) else mine == other
            assert same, key


# Layers of the peer's HierarchicalVQ that only move dimensions.
PLUMBING = {
    *("flatten_indices", "flatten_spatial", "indices_to_spatial", "mask_from_channel", "mask_to_channel"),
    *("to_channel_first", "to_channel_last", "unflatten_spatial"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_public_attribute_is_there(name: str) -> None:
    theirs, ours = example(name, peer), example(name, fastvq)
    public = {key for key in dir(theirs) if not key.startswith("_")} - set(dir(nn.Module())) - PLUMBING
    missing = {key for key in public if not hasattr(ours, key)}
    assert not missing
    for key in public:
        value = getattr(theirs, key, None)  # some of the peer's properties fail
        if isinstance(value, bool | int | float | str | torch.dtype):
            assert getattr(ours, key) == value, key


@pytest.mark.parametrize("name", NAMES)
def test_modules_can_be_copied_and_pickled(name: str) -> None:
    module = example(name, fastvq).eval()
    shape = (2, 6) if name == "EvoLFQ" else next(shape for case, _, shape, _ in CASES if case == name)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        found = []
        for layer in (module, twin):
            torch.manual_seed(0)
            found.append(observe(layer, torch.ones(shape)))
        assert_agree(*found, rtol=0)


def test_binary_mapper_methods() -> None:
    ours, theirs = twins("BinaryMapper", bits=5)
    logits, indices = torch.randn(3, 4, 5), torch.randint(32, (3, 4))
    one_hot = nn.functional.one_hot(indices, 32)
    for arguments in ({"indices": indices}, {"one_hot": one_hot}, {"indices": indices, "sum_bits": False}):
        torch.testing.assert_close(ours.log_prob(logits, **arguments), theirs.log_prob(logits, **arguments))
    torch.testing.assert_close(ours.binary_entropy(logits), theirs.binary_entropy(logits))
    assert torch.equal(ours.codes, theirs.codes)


# Seeded faults: what the comparer must see. Class, constructor, forward, what is replaced in fastvq.nn, and by what.
RESIDUAL = {"levels": [8, 5, 5], "dim": 6, "num_quantizers": 3}
DROPOUT = {"codebook_size": 8, "dim": 6, "num_quantizers": 6, "quantize_dropout": True}
FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, Any]] = {
    "no gradient to the input": ("FSQ", {"levels": [8, 5, 5]}, {}, "fsq.straight_through", lambda soft, hard: hard),
    "gradient doubled": (
        *("LFQ", {"dim": 6}, {}, "lfq.straight_through"),
        lambda soft, hard: hard.detach() + 2 * (soft - soft.detach()),
    ),
    "reach of the bound": (
        *("FSQ", {"levels": [8, 5, 5]}, {}, "fsq.FSQ.bound"),
        functools.partialmethod(fastvq.FSQ.bound, eps=2e-2),
    ),
    "entropy without its floor": ("LFQ", {"dim": 12}, {"inv_temperature": 0.5}, "binary_entropy.FLOOR", 1e-30),
    "entropy of the batch left out": ("LFQ", {"dim": 6}, {}, "lfq.entropy", lambda p: 0.0 * p.sum(-1)),
    "mask ignored": (
        *("LFQ", {"dim": 6, "diversity_gamma": 2}, {"mask": torch.arange(11).expand(3, 11) < 4}, "lfq._mean_weights"),
        lambda rows, kept: rows.new_full(rows.shape[:1], 1 / len(rows)),
    ),
    "loss doubled": (
        *("LatentQuantize", {"levels": [5, 8, 3], "dim": 6}, {}, "latent_quantize.LatentQuantize.commitment_loss"),
        lambda self, z, zhat: 2 * (z.detach() - zhat).square().mean(),
    ),
    "scale of the codes": ("FSP", {"levels": [8, 5, 5]}, {}, "fsp._UNIFORM_STD", 0.289),
    "residual in half precision": ("ResidualFSQ", RESIDUAL, {}, "residual.at_least_float32", torch.Tensor.bfloat16),
    "one stage more": (
        *("ResidualLFQ", DROPOUT, {"rand_quantize_dropout_fixed_seed": 1}, "stage_dropout.StageDropout._whole"),
        lambda self, last: last + 1,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparer_sees(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options, call, target, replacement = FAULTS[fault]
    ours, theirs = twins(name, ours_only=options_for_ours(name, options), **options)
    x = torch.randn((3, 6, 11) if name == "LatentQuantize" else (3, 11, ours.dim))
    wanted = observe(theirs, x, **call)
    assert_agree(observe(ours, x, **call), wanted, dtypes=False)
    monkeypatch.setattr(f"fastvq.nn.{target}", replacement)
    with pytest.raises(AssertionError):
        assert_agree(observe(ours, x, **call), wanted, dtypes=False)
