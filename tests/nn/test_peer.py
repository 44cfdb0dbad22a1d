"""The layer against vector-quantize-pytorch: constructor, state, outputs, gradients, training."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from common import CODES, DIM, assert_same, pair, step
from vector_quantize_pytorch import VectorQuantize as Peer

import fastvq

STATES = [
    {},
    {"codebook_dim": 3},
    {"heads": 2, "codebook_dim": 3},
    {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    {"use_cosine_sim": True},
    {"kmeans_init": True},
    {"learnable_codebook": True, "ema_update": False},
    {"learnable_codebook": True, "ema_update": False, "codebook_dim": 4, "heads": 3},
]

GRID = [
    {},
    {"decay": 0.99, "eps": 1e-3, "commitment_weight": 0.25},
    {"rotation_trick": False},
    {"commitment_weight": 0.0},
    {"ema_update": False},
    {"freeze_codebook": True},
    {"use_cosine_sim": True},
    {"use_cosine_sim": True, "rotation_trick": False, "codebook_dim": 5},
    {"codebook_dim": 3},
    {"codebook_dim": 1, "rotation_trick": False},
    {"heads": 2},
    {"heads": 7, "codebook_dim": 1},
    {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    {"heads": 1, "separate_codebook_per_head": True},
    {"heads": 3, "codebook_dim": 2, "use_cosine_sim": True, "separate_codebook_per_head": True},
    {"learnable_codebook": True, "ema_update": False},
    {"learnable_codebook": True, "ema_update": False, "rotation_trick": False, "commitment_weight": 0.3},
    {"learnable_codebook": True, "ema_update": False, "heads": 2, "codebook_dim": 3},
    {"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 3},
    {"threshold_ema_dead_code": 3},
    {"threshold_ema_dead_code": 3, "ema_update": False},
    {"threshold_ema_dead_code": 3, "heads": 2, "separate_codebook_per_head": True},
    {"threshold_ema_dead_code": 3, "use_cosine_sim": True},
]

LAYOUTS = {
    "last": ({}, (3, 11, DIM)),
    "first": ({"channel_last": False}, (3, DIM, 11)),
    "image": ({"accept_image_fmap": True}, (2, DIM, 5, 3)),
    "single": ({}, (23, DIM)),
    "single, first": ({"channel_last": False}, (23, DIM)),
}


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
    for build in (fastvq.VectorQuantize, Peer):
        torch.manual_seed(4)
        states.append(build(DIM, CODES, **options).state_dict())
    assert list(states[0]) == list(states[1])
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype
        assert torch.equal(states[0][name], value), name


@pytest.mark.parametrize("options", STATES, ids=name_of)
def test_checkpoints_load_both_ways(options: dict[str, object]) -> None:
    x = torch.randn(3, 11, DIM)
    ours, theirs = fastvq.VectorQuantize(DIM, CODES, **options), Peer(DIM, CODES, **options)
    ours(x)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs(torch.randn(3, 11, DIM))
    fresh = fastvq.VectorQuantize(DIM, CODES, **options)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    assert_same(fresh.state_dict(), before, rtol=0, atol=0)
    fresh.eval(), theirs.eval()
    x = torch.randn(3, 11, DIM)
    for mine, other in zip(fresh(x), theirs(x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert_same(fresh.state_dict(), before, rtol=0, atol=0)  # no k-means: the checkpoint says it is done


@pytest.mark.parametrize("options", GRID, ids=name_of)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_steps(options: dict[str, object], training: bool) -> None:
    ours, theirs = pair(**options)
    ours.train(training), theirs.train(training)
    for seed in range(3):
        x = torch.randn(3, 19, DIM, generator=torch.Generator().manual_seed(seed))
        if training:
            assert_same(step(ours, x), step(theirs, x))
        else:
            for mine, other in zip(ours(x), theirs(x), strict=True):
                assert mine.dtype == other.dtype
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            assert_same(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"codebook_dim": 3}, {"heads": 2, "codebook_dim": 3}, {"heads": 2, "separate_codebook_per_head": True}],
    ids=name_of,
)
def test_layouts(layout: str, options: dict[str, object]) -> None:
    extra, shape = LAYOUTS[layout]
    ours, theirs = pair(**options, **extra)
    for seed in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert_same(step(ours, x), step(theirs, x))


@pytest.mark.parametrize(
    "options",
    [{}, {"learnable_codebook": True, "ema_update": False}, {"channel_last": False}, {"return": "lens"}],
    ids=name_of,
)
def test_masks(options: dict[str, object]) -> None:
    lens = torch.tensor([4, 11, 0])
    by_lens = options == {"return": "lens"}
    ours, theirs = pair(**({} if by_lens else options))
    x = torch.randn(3, 11, DIM)
    if options.get("channel_last") is False:
        x = x.transpose(1, 2)
    mask = {"lens": lens} if by_lens else {"mask": torch.arange(11) < lens[:, None]}
    for _ in range(3):
        assert_same(step(ours, x, **mask), step(theirs, x, **mask))
    ours.eval(), theirs.eval()
    for mine, other in zip(ours(x, **mask), theirs(x, **mask), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


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


def test_hundred_steps() -> None:
    for options in ({"decay": 0.95}, {"decay": 0.9, "use_cosine_sim": True}):
        ours, theirs = pair(**options)
        generator = torch.Generator().manual_seed(5)
        for _ in range(100):
            x = torch.randn(4, 25, DIM, generator=generator)
            assert_same(step(ours, x), step(theirs, x), rtol=1e-4, atol=1e-5)
