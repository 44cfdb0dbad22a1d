"""The layer against vector-quantize-pytorch: constructor, state, outputs, gradients, training."""

from __future__ import annotations

import inspect
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from common import CODES, DIM, assert_same, pair, step
from differential import (
    BATCH,
    FACTORS,
    LEARNABLE,
    LENGTH,
    PLAIN,
    batches,
    build,
    compare,
    compare_case,
    compare_kmeans,
    compare_near_ties,
    compare_options,
    compare_ties,
    pairs_of,
    pairwise,
)
from differential import CODES as DIFFERENTIAL_CODES
from differential import DIM as DIFFERENTIAL_DIM
from torch import nn
from vector_quantize_pytorch import VectorQuantize as Peer

import fastvq

STATES: list[dict[str, Any]] = [
    {},
    {"codebook_dim": 3},
    {"heads": 2, "codebook_dim": 3},
    {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    {"use_cosine_sim": True},
    {"kmeans_init": True},
    {"learnable_codebook": True, "ema_update": False},
    {"learnable_codebook": True, "ema_update": False, "codebook_dim": 4, "heads": 3},
    {"orthogonal_reg_weight": 0.1},
    {"directional_reparam": True, "threshold_ema_dead_code": 1},
    {"vq_bridge": nn.Linear(DIM, DIM)},
    {"codebook_dim": 3, "layernorm_after_project_in": True},
    {"affine_param": True},
    {"affine_param": True, "heads": 2, "separate_codebook_per_head": True},
]

OPTIONS: list[dict[str, Any]] = [
    {"decay": 0.99, "eps": 1e-3, "commitment_weight": 0.25},
    {"commitment_weight": 0.0},
    {"ema_update": False},
    {"freeze_codebook": True},
    {"manual_ema_update": True},
    {"heads": 1, "separate_codebook_per_head": True},
    {"codebook_dim": 1, "rotation_trick": False},
    {"heads": 6, "codebook_dim": 1},
    {"heads": 3, "codebook_dim": 2, "use_cosine_sim": True, "separate_codebook_per_head": True},
    {"codebook_dim": 3, "layernorm_after_project_in": True},
    {"threshold_ema_dead_code": 3},
    {"threshold_ema_dead_code": 3, "ema_update": False},
    {"threshold_ema_dead_code": 3, "use_cosine_sim": True},
    {"threshold_ema_dead_code": 3, "heads": 2, "separate_codebook_per_head": True},
    {"threshold_ema_dead_code": 3} | LEARNABLE,
    {"commitment_use_cross_entropy_loss": True} | LEARNABLE,
    {"commitment_use_cross_entropy_loss": True, "freeze_codebook": True, "use_cosine_sim": True},
    {"commitment_use_cross_entropy_loss": True, "freeze_codebook": True, "heads": 2},
    {"commitment_use_cross_entropy_loss": True, "heads": 2, "separate_codebook_per_head": True} | LEARNABLE,
    {"codebook_diversity_loss_weight": 0.3, "codebook_diversity_temperature": 2.0} | LEARNABLE,
    {"codebook_diversity_loss_weight": 0.3, "codebook_diversity_temperature": 9.0, "heads": 2} | LEARNABLE,
    {"codebook_diversity_loss_weight": 0.3, "use_cosine_sim": True, "freeze_codebook": True, "heads": 2}
    | {"codebook_diversity_temperature": 2.0, "separate_codebook_per_head": True},
    {"orthogonal_reg_weight": 0.3},
    {"orthogonal_reg_weight": 0.3, "orthogonal_reg_active_codes_only": True} | LEARNABLE,
    {"orthogonal_reg_weight": 0.3, "orthogonal_reg_max_codes": 5},
    {"orthogonal_reg_weight": 0.3, "heads": 2, "separate_codebook_per_head": True},
    {"orthogonal_reg_weight": 0.3, "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.3)},
    {"in_place_codebook_optimizer": partial(torch.optim.Adam, lr=0.03), "threshold_ema_dead_code": 1} | LEARNABLE,
    {"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.3), "manual_in_place_optimizer_update": True}
    | LEARNABLE,
    {"directional_reparam": True, "threshold_ema_dead_code": 1e-9, "directional_reparam_variance": 0},
    {"affine_param": True},
    {"affine_param": True, "affine_param_batch_decay": 0.5, "affine_param_codebook_decay": 0.3} | LEARNABLE,
    {"affine_param": True, "heads": 2, "separate_codebook_per_head": True},
    {"sync_update_v": 0.5} | LEARNABLE,
    {"route_gradients_to_input": False} | LEARNABLE,
    {"vq_bridge": nn.Linear(DIFFERENTIAL_DIM, DIFFERENTIAL_DIM)},
]

MASK = torch.arange(LENGTH) < torch.tensor([[4], [LENGTH], [0]])
CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"ema_update_weight": torch.linspace(0, 1, DIFFERENTIAL_CODES)}),
    ({"heads": 2, "separate_codebook_per_head": True}, {"ema_update_weight": torch.rand(2, DIFFERENTIAL_CODES)}),
    ({}, {"ema_update_weight": lambda sums, counts: sums.norm(dim=-1).sigmoid() * counts.clamp(max=1)}),
    ({}, {"ema_update": False}),
    ({"threshold_ema_dead_code": 1}, {"ema_update": False}),
    ({"ema_update": False}, {"ema_update": True}),
    ({"return_zeros_for_masked_padding": False}, {"mask": MASK}),
    ({"affine_param": True}, {"mask": MASK}),
    ({"commitment_use_cross_entropy_loss": True} | LEARNABLE, {"mask": MASK}),
    ({"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.3)} | LEARNABLE, {"mask": MASK}),
]


def name_of(options: dict[str, object]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.mark.parametrize("owner", ["__init__", "forward"])
def test_arguments_are_the_peers(owner: str) -> None:
    ours = inspect.signature(getattr(fastvq.VectorQuantize, owner)).parameters
    theirs = inspect.signature(getattr(Peer, owner)).parameters
    ours = {name: p for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY}  # strict_compat
    assert list(ours) == list(theirs)
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


@pytest.mark.parametrize("options", STATES, ids=name_of)
def test_first_state_is_the_peers_from_the_same_seed(options: dict[str, object]) -> None:
    states = []
    for kind in (fastvq.VectorQuantize, Peer):
        torch.manual_seed(4)
        states.append(kind(DIM, CODES, **options).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype
        if name not in ("_codebook.codebook_mean", "_codebook.codebook_variance"):  # no values yet: `torch.empty`
            assert torch.equal(states[0][name], value), name


@pytest.mark.parametrize("options", STATES, ids=name_of)
def test_checkpoints_load_both_ways(options: dict[str, object]) -> None:
    x = torch.randn(3, 11, DIM)
    ours, theirs = fastvq.VectorQuantize(DIM, CODES, **options), Peer(DIM, CODES, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours(x)
    affine = "affine_param" in options
    if affine:
        theirs(x)  # a new layer of the peer's refuses the state of a trained one
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs(torch.randn(3, 11, DIM))
    fresh = fastvq.VectorQuantize(DIM, CODES, **options, strict_compat=affine)  # the peer's moves in eval mode
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    assert_same(fresh.state_dict(), before, rtol=0, atol=0)
    fresh.eval(), theirs.eval()
    x = torch.randn(3, 11, DIM)
    for mine, other in zip(fresh(x), theirs(x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    if not affine:
        assert_same(fresh.state_dict(), before, rtol=0, atol=0)  # no k-means: the checkpoint says it is done


def test_the_grid_covers_every_pair_of_levels() -> None:
    """But for those which no case of the peer's survives: these are known, each by the two levels."""
    covered = set().union(*map(pairs_of, pairwise()))
    everything = {
        ((factor, level), (other, its))
        for factor, other in itertools.combinations(FACTORS, 2)
        for level, its in itertools.product(FACTORS[factor], FACTORS[other])
    }
    heads_or_layouts = ("shared", "separate", "projected", "image", "volume", "single")
    impossible = {
        *(("cosine", teacher) for teacher in ("learnable", "in place")),
        *itertools.product(heads_or_layouts, ("mask", "lens")),
        ("first", "lens"),
        *itertools.product(("in place", "projected"), ("bfloat16", "float64")),
    }
    assert {(level, its) for (_, level), (_, its) in everything - covered} == impossible
    assert covered <= everything


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(case.values()))
def test_every_pair_of_levels_over_twenty_steps(case: dict[str, str]) -> None:
    compare_case(case)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_options(options: dict[str, Any]) -> None:
    compare_options(**options)


@pytest.mark.parametrize(("options", "arguments"), CALLS, ids=",".join)
def test_arguments_of_forward(options: dict[str, Any], arguments: dict[str, Any]) -> None:
    compare(build(**options), batches(PLAIN, 3), **arguments)


def test_near_ties_and_kmeans() -> None:
    compare_near_ties()
    compare_ties()
    compare_kmeans()


TOP_K: list[dict[str, Any]] = [
    {},
    {"use_cosine_sim": True},
    {"commitment_weight": 0.0},
    {"codebook_dim": 3},
    {"rotation_trick": False} | LEARNABLE,
    {"accept_image_fmap": True},
]


@pytest.mark.parametrize("options", TOP_K, ids=name_of)
@pytest.mark.parametrize("k", [1, 4, 99])
def test_top_k(options: dict[str, Any], k: int) -> None:
    """The peer loses the shape of the commitment part of a feature map, so the breakdown is left out."""
    x = torch.randn((2, 6, 5, 4) if options.get("accept_image_fmap") else (3, 11, 6))
    for training, masks in itertools.product([True, False], [{}, {"mask": torch.rand(3, 11) < 0.5}]):
        if masks and x.dim() == 4:
            continue
        found = []
        for layer in build(**options):
            layer.train(training)
            tokens = x.clone().requires_grad_()
            quantized, indices, loss = layer(tokens, topk=k, **masks)
            ((quantized * quantized.detach().cos()).sum() + loss.sin().sum()).backward()
            found.append({"quantized": quantized, "indices": indices, "loss": loss, "grad": tokens.grad})
        assert_same(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        LEARNABLE,
        {"rotation_trick": False},
        {"use_cosine_sim": True},
        LEARNABLE | {"commitment_use_cross_entropy_loss": True},
        LEARNABLE | {"codebook_diversity_loss_weight": 0.3, "codebook_diversity_temperature": 3.0},
        LEARNABLE | {"heads": 2, "codebook_dim": 3},
    ],
    ids=name_of,
)
@pytest.mark.parametrize("k", [None, 3])
def test_codebooks_made_for_each_token(options: dict[str, Any], k: int | None) -> None:
    if k is not None and (options.get("heads") or options.get("commitment_use_cross_entropy_loss")):
        pytest.skip("top k has one head and no cross entropy")
    layers = build(**options)
    dim = layers[0]._codebook.embed.shape[-1]
    condition = torch.randn(1, BATCH * options.get("heads", 1), LENGTH, 1, dim)
    x = torch.randn(BATCH, LENGTH, 6)
    found = []
    for layer in layers:
        layer.zero_grad()
        tokens, mixing = x.clone().requires_grad_(), torch.eye(dim).requires_grad_()
        quantized, indices, loss = layer(
            tokens, topk=k, codebook_transform_fn=lambda e, m=mixing: (e[:, None, None] + condition @ m).tanh()
        )
        ((quantized * quantized.detach().cos()).sum() + loss.sum()).backward()
        found.append({"q": quantized, "indices": indices, "loss": loss, "grad": tokens.grad})
        found[-1] |= {"mixing": mixing.grad} if mixing.grad is not None else {}
        found[-1] |= {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert_same(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 2}, {"heads": 2, "separate_codebook_per_head": True}, {"use_cosine_sim": True}],
    ids=name_of,
)
def test_cross_entropy_to_given_indices(options: dict[str, Any]) -> None:
    x = torch.randn(BATCH, LENGTH, 6)
    wanted = torch.randint(-1, 13, (BATCH, LENGTH, 2) if options.get("heads") else (BATCH, LENGTH))
    found = []
    for layer in build(freeze_codebook=True, strict_compat=True, **options):
        tokens = x.clone().requires_grad_()
        quantized, loss = layer(tokens, indices=wanted)
        (quantized.square().sum() + loss).backward()
        found.append({"quantized": quantized, "loss": loss, "grad": tokens.grad})
    assert_same(*found)
    ours, _ = build(**options)
    assert ours(x, indices=wanted)[0].shape == x.shape


def test_accumulated_updates() -> None:
    """Two batches in one update, at the steps that ask for it."""
    layers = build(threshold_ema_dead_code=0.1)
    for number, (x, _) in enumerate(batches(PLAIN, 6)):
        for layer in layers:
            layer(x, accum_ema_update=number % 3 < 2)
        assert_same(layers[0].state_dict(), layers[1].state_dict())
    once = build()[0]
    once(torch.cat([x for x, _ in batches(PLAIN, 3)]))
    twice = build()[0]
    for number, (x, _) in enumerate(batches(PLAIN, 3)):
        twice(x, accum_ema_update=number < 2)
    assert_same(once.state_dict(), twice.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"straight_through": True, "rotation_trick": False},
        {"affine_param": True},
        {"affine_param": True, "threshold_ema_dead_code": 1},
    ],
    ids=name_of,
)
def test_strict_compat_is_as_before(options: dict[str, Any]) -> None:
    def train_and_evaluate(*, strict_compat: bool) -> None:
        layers = build(strict_compat=strict_compat, **options)
        compare(layers, batches(PLAIN, 3))
        compare([layer.eval() for layer in layers], batches(PLAIN, 2))

    train_and_evaluate(strict_compat=True)
    with pytest.raises(AssertionError):
        train_and_evaluate(strict_compat=False)


def test_strict_compat_of_codes_from_indices() -> None:
    padding = torch.tensor([[3, -1, 0]])
    for options in ({}, {"affine_param": True}, {"codebook_dim": 3}):
        layers = build(strict_compat=True, **options)
        for layer in layers:
            layer(torch.randn(BATCH, LENGTH, 6, generator=torch.Generator().manual_seed(0)))
        for method in ("get_codes_from_indices", "get_output_from_indices"):
            ours, theirs = (getattr(layer, method)(padding) for layer in layers)
            torch.testing.assert_close(ours, theirs)
            right = build(**options)[0]
            right.load_state_dict(layers[0].state_dict())
            assert not torch.allclose(getattr(right, method)(padding), theirs)


def test_strict_compat_of_assigned_codes_and_empty_clusters() -> None:
    x = torch.randn(BATCH, LENGTH, 6)
    layers = build(strict_compat=True)
    for layer in layers:
        layer.codebook = torch.arange(78.0).view(13, 6)
        layer(x)
    assert_same(layers[0].state_dict(), layers[1].state_dict())
    layers = build(strict_compat=True, kmeans_init=True)
    for layer in layers:
        layer.eval()(torch.full((BATCH, LENGTH, 6), 3.0))
    assert_same(layers[0].state_dict(), layers[1].state_dict())
    assert (layers[0].codebook == 0).all(1).any()


@pytest.mark.parametrize("strict", [False, True])
def test_fixed_input_before_a_projection(strict: bool) -> None:
    """The gradient of `project_in` from the output: none there, but where it goes through a softmax."""
    x = torch.randn(BATCH, LENGTH, 6)
    for options in ({}, {"straight_through": True, "rotation_trick": False, "sample_codebook_temp": 0.7}):
        found = []
        for layer in build(
            strict_compat=strict, codebook_dim=3, commitment_weight=0.0, freeze_codebook=True, **options
        ):
            layer(x)[0].sin().sum().backward()
            found.append(layer.project_in.weight.grad)
        if options:
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        else:
            assert found[1] is None
            assert (found[0] is None) == strict


def test_methods_that_learn_outside_of_forward() -> None:
    """By the peer's names; on one sequence, since its `expire_codes_` draws from the first alone."""
    x = torch.randn(1, BATCH * LENGTH, 6)
    separate = {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}
    for options in ({}, separate, {"use_cosine_sim": True}):
        layers = build(manual_ema_update=True, threshold_ema_dead_code=1, **options)
        for layer in layers:
            _, indices, _ = layer.eval()(x)
            torch.manual_seed(0)
            layer.train().update_indices(x, indices)
            layer._codebook.update_ema()
            torch.manual_seed(0)
            layer._codebook.cluster_size[:, 3] = 0.5
            layer.expire_codes_(x)
        assert_same(layers[0].state_dict(), layers[1].state_dict())
    layers = build(
        in_place_codebook_optimizer=partial(torch.optim.SGD, lr=1.0), manual_in_place_optimizer_update=True, **LEARNABLE
    )
    for layer in layers:
        before = layer.codebook.detach().clone()
        layer(x)
        assert torch.equal(layer.codebook, before)
        layer.update_in_place_optimizer()
        assert not torch.equal(layer.codebook, before)
    assert_same(layers[0].state_dict(), layers[1].state_dict())


def test_freezing_a_call() -> None:
    for constructor, call in itertools.product([True, False], [True, False, None]):
        ours, theirs = pair(freeze_codebook=constructor, threshold_ema_dead_code=2)
        x = torch.randn(3, 11, DIM)
        before = ours.codebook.clone()
        assert_same(step(ours, x, freeze_codebook=call), step(theirs, x, freeze_codebook=call))
        assert torch.equal(ours.codebook, before) == (constructor if call is None else call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_the_returns(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    x = torch.randn(3, 11, DIM).to(dtype)
    mine, other = ours(x), theirs(x)
    assert [t.dtype for t in mine] == [t.dtype for t in other]
    assert [t.shape for t in mine] == [t.shape for t in other]
    torch.testing.assert_close(mine[0], other[0], rtol=1e-2, atol=1e-2)
    ours.eval(), theirs.eval()
    quantized, indices, loss = ours(x)
    assert (quantized.dtype, indices.dtype, loss.dtype, loss.shape) == (dtype, torch.int64, torch.float32, ())
    assert float(loss) == 0.0
    assert not loss.requires_grad


@pytest.mark.parametrize("options", [{}, {"commitment_weight": 0.0}, {"use_cosine_sim": True}], ids=name_of)
def test_the_training_loss_always_has_a_gradient(options: dict[str, object]) -> None:
    for layer in pair(**options):
        _, _, loss = layer(torch.randn(3, 11, DIM))
        assert loss.requires_grad
        loss.backward()
    ours, _ = pair(**options)
    with torch.no_grad():
        assert not ours(torch.randn(3, 11, DIM))[2].requires_grad


def test_without_an_encoder_the_output_trains_the_learnable_codes() -> None:
    grads = []
    for layer in pair(learnable_codebook=True, ema_update=False):
        quantized, _, loss = layer(torch.randn(3, 11, DIM, generator=torch.Generator().manual_seed(0)))
        (quantized.sin().sum() + loss).backward()
        grads.append(layer._codebook.embed.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_no_gradient_leaves_in_eval_mode() -> None:
    for layer in pair():
        x = torch.randn(3, 11, DIM, requires_grad=True)
        assert not layer.eval()(x)[0].requires_grad


def test_a_frozen_learnable_codebook_gets_no_gradient() -> None:
    ours, theirs = pair(learnable_codebook=True, ema_update=False)
    x = torch.randn(3, 11, DIM)
    assert_same(step(ours, x, freeze_codebook=True), step(theirs, x, freeze_codebook=True))
    assert ours._codebook.embed.grad is None
