"""What the layer carries from step to step, through casts, copies, checkpoints and hands on the codebook."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import CODES, DIM, assert_same, pair, step
from torch import Tensor, nn

import fastvq
from fastvq import functional


@pytest.mark.parametrize(
    "options", [{}, {"heads": 2, "separate_codebook_per_head": True}, {"use_cosine_sim": True}], ids=str
)
def test_assigned_codes_stay(options: dict[str, object]) -> None:
    """The peer's next step drags them back to its old averages."""
    layer, _ = pair(**options)
    step(layer, torch.randn(30, DIM))
    codes = nn.functional.normalize(torch.randn(layer.codebook.shape), dim=-1)
    layer.codebook = codes
    torch.testing.assert_close(layer.codebook, codes, rtol=1e-6, atol=1e-7)
    layer(torch.empty(0, DIM))  # a step without rows: the averages alone
    torch.testing.assert_close(layer.codebook, codes, rtol=1e-4, atol=1e-5)


def test_assigned_codes_of_a_cosine_codebook_are_normalised() -> None:
    layer, _ = pair(use_cosine_sim=True)
    codes = 5 * torch.randn(CODES, DIM)
    layer.codebook = codes
    torch.testing.assert_close(layer.codebook, nn.functional.normalize(codes, dim=-1))


def test_assigned_codes_take_the_place_of_kmeans() -> None:
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True).eval()
    codes = torch.randn(CODES, DIM)
    layer.codebook = codes
    layer(torch.randn(30, DIM))
    assert torch.equal(layer.codebook, codes)


def test_assigning_to_a_learnable_codebook_keeps_the_parameter() -> None:
    layer, _ = pair(learnable_codebook=True, ema_update=False)
    (before,) = layer.parameters()
    codes = torch.randn(CODES, DIM)
    layer.codebook = codes
    assert next(layer.parameters()) is before
    assert torch.equal(layer.codebook, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_modules_keep_their_averages(dtype: torch.dtype) -> None:
    layer, _ = pair(decay=0.99, codebook_dim=3)
    wide = copy.deepcopy(layer)
    layer.to(dtype)
    assert layer.project_in.weight.dtype == dtype
    assert {b.dtype for b in layer._codebook.buffers()} == {torch.float32, torch.bool}
    for seed in range(100):
        x = torch.randn(64, DIM, generator=torch.Generator().manual_seed(seed))
        quantized, _, loss = layer(x.to(dtype))
        assert (quantized.dtype, loss.dtype) == (dtype, torch.float32)
        wide(x)
    sizes = layer._codebook.cluster_size, wide._codebook.cluster_size
    torch.testing.assert_close(*(s.sum() for s in sizes), rtol=1e-4, atol=0)
    layer.float().double()
    assert layer._codebook.embed.dtype == torch.float64


def test_a_learnable_codebook_is_cast() -> None:
    layer, _ = pair(learnable_codebook=True, ema_update=False)
    assert layer.bfloat16()._codebook.embed.dtype == torch.bfloat16
    quantized, _, loss = layer(torch.randn(30, DIM, dtype=torch.bfloat16))
    (quantized.float().sum() + loss).backward()


def test_checkpoints_carry_whether_kmeans_is_done() -> None:
    done = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True)
    new = copy.deepcopy(done.state_dict())
    done(torch.randn(30, DIM))
    for source, wanted in ((done.state_dict(), True), (new, False)):
        layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=not wanted).eval()
        layer.load_state_dict(source)
        layer(torch.randn(30, DIM))
        assert torch.equal(layer.codebook, done.codebook) == wanted
    nested = nn.Sequential(nn.Linear(DIM, DIM), fastvq.VectorQuantize(DIM, CODES, kmeans_init=True)).eval()
    nested[1].load_state_dict(copy.deepcopy(done.state_dict()), assign=True)
    nested(torch.randn(30, DIM))
    assert torch.equal(nested[1].codebook, done.codebook)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_go_on_alike(copied: str) -> None:
    layer = fastvq.VectorQuantize(DIM, CODES, kmeans_init=True, threshold_ema_dead_code=2)
    step(layer, torch.randn(30, DIM))
    if copied == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(30, DIM)
    assert_same(step(layer, x), step(twin, x), rtol=0, atol=0)


def test_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = fastvq.VectorQuantize(DIM, CODES, codebook_dim=3)
    source, _ = pair(codebook_dim=3)
    layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    x = torch.randn(30, DIM)
    assert_same(step(layer, x), step(source, x), rtol=0, atol=0)
    assert layer.perplexity == source.perplexity > 1


def test_counts_are_where_the_codes_are() -> None:
    """They are in no checkpoint, which may put all else on another device."""
    layer, twin = (pair(rotation_trick=False)[0] for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    layer._codebook.counts = layer._codebook.counts.to("meta")
    x = torch.randn(30, DIM)
    assert_same(step(layer, x), step(twin, x), rtol=0, atol=0)
    assert layer.perplexity == twin.perplexity > 1


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 3}], ids=str)
def test_the_gradient_is_of_the_codes_that_were_used(options: dict[str, object]) -> None:
    """The codes move in place before the backward pass; two forwards before it must not disturb each other."""
    layer, _ = pair(rotation_trick=False, **options)
    x = [torch.randn(40, DIM, requires_grad=True) for _ in range(2)]
    results = [layer(rows) for rows in x]
    sum(loss for _, _, loss in results).backward()
    for rows, (quantized, _, _) in zip(x, results, strict=True):
        other = rows.detach().clone().requires_grad_()
        normal = nn.functional.normalize(other, dim=-1) if layer.use_cosine_sim else other
        (normal - quantized.detach()).square().mean().backward()
        torch.testing.assert_close(rows.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_nothing_is_learnt_in_eval_mode_or_of_a_frozen_codebook() -> None:
    layer, _ = pair(threshold_ema_dead_code=100)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(30, DIM), freeze_codebook=True)
    layer.eval()(torch.randn(30, DIM))
    assert_same(layer.state_dict(), before, rtol=0, atol=0)


def test_quantized_is_exactly_the_codes() -> None:
    """Of the rotation trick and the straight-through estimator too, where the peer's are off by rounding."""
    for options in ({}, {"rotation_trick": False}, {"use_cosine_sim": True}):
        layer, _ = pair(**options)
        codes = layer.codebook.clone()
        quantized, indices, _ = layer(torch.randn(50, DIM, requires_grad=True))
        assert torch.equal(quantized, codes[indices])


def test_a_projection_is_trained_though_the_input_is_fixed() -> None:
    """The peer passes no gradient to project_in when its input needs none."""
    layer, _ = pair(codebook_dim=3, commitment_weight=0.0)
    layer(torch.randn(50, DIM))[0].sin().sum().backward()
    assert layer.project_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cosine_sim": True},
        {"kmeans_init": True},
        {"affine_param": True},
        {"heads": 2, "codebook_dim": DIM, "separate_codebook_per_head": True},
        {"threshold_ema_dead_code": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_that_is_not_finite_does_not_poison_the_codebook(options: dict[str, object], dtype: torch.dtype) -> None:
    """The peer's codebook is NaN from then on; here nothing is learnt from the row, and the others lose nothing."""
    layer, twin = pair(**options)[0], pair(**options)[0]
    x = torch.randn(3, 20, DIM).to(dtype).to(torch.float32 if "heads" in options else dtype)
    kept = torch.ones(3, 20, dtype=torch.bool)
    kept[0, 3] = kept[2, 7] = False
    broken = x.clone()
    broken[0, 3, 2], broken[2, 7] = torch.nan, torch.inf
    for _ in range(2):
        results = []
        for learner, rows, mask in ((layer, broken, None), (twin, x, kept)):
            torch.manual_seed(0)
            results.append(learner(rows, mask=mask))
        assert all(value.isfinite().all() for value in layer.state_dict().values())
        if "threshold_ema_dead_code" not in options:  # draws differ
            assert torch.equal(results[0][0][kept], results[1][0][kept])
            assert torch.equal(results[0][1][kept], results[1][1][kept])
            assert_same(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert not results[0][2].isfinite()


def test_usage_and_perplexity_of_the_last_step() -> None:
    layer, _ = pair(heads=2, codebook_dim=3, separate_codebook_per_head=True)
    assert layer.codebook_usage.tolist() == [0, 0]
    assert layer.perplexity.tolist() == [1, 1]
    for options in ({}, {"freeze_codebook": True}):
        x = torch.randn(3, 20, DIM)
        mask = torch.rand(3, 20) < 0.7
        _, indices, _ = layer(x, mask=mask, **options)
        if not options:
            chances = torch.stack([torch.bincount(head, minlength=CODES) for head in indices[mask].t()]) / mask.sum()
        torch.testing.assert_close(layer.codebook_usage, (chances > 0).float().mean(1))
        torch.testing.assert_close(layer.perplexity, torch.exp(-torch.xlogy(chances, chances).sum(1)))
    layer.eval()(torch.randn(3, 20, DIM))
    torch.testing.assert_close(layer.codebook_usage, (chances > 0).float().mean(1))
    assert "counts" not in "".join(layer.state_dict())
    learnable, _ = pair(learnable_codebook=True, ema_update=False)
    learnable.codebook = torch.randn(CODES, DIM)
    learnable(learnable.codebook.detach())
    assert (learnable.codebook_usage.shape, learnable.codebook_usage.item()) == ((), 1)
    assert learnable.perplexity.item() == pytest.approx(CODES, rel=1e-6)


def test_codes_that_learn_by_gradient_are_counted_in_the_pass_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of `code_sums`: of rows that are finite and that the mask keeps."""
    options = {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}
    layer, _ = pair(**options, learnable_codebook=True, ema_update=False)
    x, mask = torch.randn(3, 20, DIM), torch.rand(3, 20) < 0.7
    x[0, 3, 1], x[1, 0] = torch.nan, torch.inf
    mask[0, 3] = mask[1, 0] = True

    def counts_of(call: Callable[..., object]) -> Tensor:
        layer._codebook.counts.fill_(-1)
        call(x, mask=mask)
        return layer._codebook.counts.clone()

    quantize = functional.vector_quantize

    def without_counts(*given: Any, return_counts: bool, **rest: Any) -> tuple[Tensor, ...]:
        return quantize(*given, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "vector_quantize", without_counts)
        wanted = counts_of(layer)
    assert wanted.sum() == 2 * (mask.sum() - 2)
    monkeypatch.setattr("fastvq.nn.codebook.code_sums", lambda *given, **rest: pytest.fail("another pass"))
    assert torch.equal(counts_of(layer), wanted)
    assert torch.equal(counts_of(torch.compile(layer, fullgraph=True, backend="aot_eager")), wanted)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 3}], ids=str)
def test_autocast_does_not_touch_the_search_nor_the_losses(options: dict[str, object]) -> None:
    layer, _ = pair(codebook_diversity_loss_weight=0.1, freeze_codebook=True, **options)
    x = torch.randn(3, 20, layer.heads * layer._codebook.embed.shape[-1])
    layer.project_in, layer.project_out, layer.has_projections = nn.Identity(), nn.Identity(), False
    layer.layout = dataclasses.replace(layer.layout, dim=x.shape[-1])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    for mine, other in zip(narrow, layer(x), strict=True):
        assert torch.equal(mine, other)
