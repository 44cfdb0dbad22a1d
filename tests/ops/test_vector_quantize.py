"""vector_quantize: values, losses and gradients against the reference and against the usual torch code."""

import contextlib

import pytest
import torch
from compare import assert_no_less_exact, assert_same_bits, assert_same_indices, expected, threads
from families import DTYPES, FAMILIES, make
from torch.nn import functional as F

import fastvq

WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.25, 1.0), (0.0, 0.0)]
FINITE = sorted(FAMILIES.keys() - {"huge", "largest", "not_finite"})


def naive(x, codebook, commitment_weight=1.0, codebook_weight=0.0, mask=None):
    """Distance matrix, argmin, one-hot, straight-through; autograd does the rest."""
    indices = (x.unsqueeze(-2) - codebook).square().sum(-1).argmin(-1)
    q = F.one_hot(indices, codebook.shape[-2]).to(codebook) @ codebook
    kept = (x, q) if mask is None else (x[mask], q[mask])
    if kept[0].numel() == 0:
        loss = 0.0 * (x.sum() + codebook.sum())
    else:
        loss = commitment_weight * F.mse_loss(kept[0], kept[1].detach())
        loss = loss + codebook_weight * F.mse_loss(kept[1], kept[0].detach())
    return x + (q - x).detach(), indices, loss


def gradients(function, x, codebook, upstream, scale, **options):
    """Gradients to x and to the codebook of sum(quantized * upstream) + scale * loss."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    quantized, _, loss = function(x, codebook, **options)
    total = (quantized * upstream).sum() + scale * loss
    return torch.autograd.grad(total, [x, codebook], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_is_exactly_the_nearest_code(backend, family, dtype):
    for n, k, d in ((211, 33, 7), (37, 300, 64), (5, 1, 1)):
        x, codebook = make(family, n, k, d, dtype, seed=k)
        quantized, indices, loss = fastvq.vector_quantize(x, codebook, backend=backend)
        wanted, _ = expected(x, codebook)
        assert_same_indices(indices, wanted, f"{n, k, d}")
        assert_same_bits(quantized, codebook[wanted].to(x.dtype), f"{n, k, d}")
        truth = (x.double() - codebook[wanted].double()).square().mean()
        working = torch.float64 if dtype == "float64" else torch.float32
        torch.testing.assert_close(loss, truth.to(working), rtol=3 * torch.finfo(working).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", FINITE)
def test_losses_and_gradients_are_no_less_exact_than_plain_torch(backend, family, weights):
    options = {"commitment_weight": weights[0], "codebook_weight": weights[1]}
    for n, k, d in ((252, 57, 12), (123, 7, 31)):
        x, codebook = make(family, n, k, d, seed=d)
        # The usual code breaks near ties in its own way; on its own data it shall be judged on arithmetic alone.
        codebook = codebook[expected(codebook, codebook)[0].unique()]
        upstream = torch.randn(n, d)
        found = fastvq.vector_quantize(x, codebook, **options, backend=backend)
        plain = naive(x, codebook, **options)
        truth = naive(x.double(), codebook.double(), **options)
        assert_no_less_exact(found[2], plain[2], truth[2], what=f"loss {n, k, d}")
        found = gradients(fastvq.vector_quantize, x, codebook, upstream, 3.0, **options, backend=backend)
        plain = gradients(naive, x, codebook, upstream, 3.0, **options)
        truth = gradients(naive, x.double(), codebook.double(), upstream.double(), 3.0, **options)
        if not torch.equal(plain[1].ne(0), truth[1].ne(0)):
            plain = truth  # plain torch chose other codes: no allowance for its error then
        for name, mine, theirs, right in zip(("x", "codebook"), found, plain, truth, strict=True):
            assert_no_less_exact(mine, theirs, right, what=f"gradient of {name} {n, k, d}")


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_gradcheck(backend, metric):
    """Numeric derivatives, wherever the stop-gradients leave the loss a true function of its input."""
    x, codebook = make("clustered", 14, 5, 3, "float64", seed=1)
    mask = torch.rand(14) < 0.7

    def commitment(x):
        return fastvq.vector_quantize(x, codebook, metric=metric, commitment_weight=0.7, mask=mask, backend=backend)[2]

    def codebook_loss(codebook):
        options = {"commitment_weight": 0.0, "codebook_weight": 0.9, "metric": metric, "mask": mask}
        return fastvq.vector_quantize(x, codebook, **options, backend=backend)[2]

    assert torch.autograd.gradcheck(commitment, x.clone().requires_grad_())
    assert torch.autograd.gradcheck(codebook_loss, codebook.clone().requires_grad_())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_autograd_with_detach(backend, weights, masked):
    x, codebook = make("gaussian", 60, 11, 5, "float64", seed=2)
    x = x.reshape(4, 15, 5)
    options = {"commitment_weight": weights[0], "codebook_weight": weights[1]}
    options["mask"] = torch.rand(4, 15) < 0.5 if masked else None
    upstream = torch.randn(4, 15, 5, dtype=torch.float64)
    found = gradients(fastvq.vector_quantize, x, codebook, upstream, -2.0, **options, backend=backend)
    wanted = gradients(naive, x, codebook, upstream, -2.0, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)


def test_each_output_alone_has_its_gradient(backend):
    x, codebook = make("gaussian", 30, 9, 4, "float64", seed=3)
    x.requires_grad_()
    codebook.requires_grad_()
    options = {"commitment_weight": 0.5, "codebook_weight": 2.0}
    quantized, indices, loss = fastvq.vector_quantize(x, codebook, **options, backend=backend)
    assert not indices.requires_grad
    upstream = torch.randn_like(quantized)
    straight, none = torch.autograd.grad(quantized, [x, codebook], upstream, retain_graph=True)
    assert_same_bits(straight, upstream, "straight-through")
    assert none.eq(0).all()
    found = torch.autograd.grad(loss, [x, codebook])
    wanted = torch.autograd.grad(naive(x, codebook, **options)[2], [x, codebook])
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("needs", ["x", "codebook", "neither"])
def test_only_what_asks_for_a_gradient_gets_one(backend, needs):
    x, codebook = torch.randn(12, 4), torch.randn(6, 4)
    x.requires_grad_(needs == "x")
    codebook.requires_grad_(needs == "codebook")
    quantized, _, loss = fastvq.vector_quantize(x, codebook, codebook_weight=1.0, backend=backend)
    assert quantized.requires_grad == loss.requires_grad == (needs != "neither")
    if needs != "neither":
        (quantized.sum() + loss).backward()
    assert (x.grad is not None) == (needs == "x")
    assert (codebook.grad is not None) == (needs == "codebook")
    with torch.no_grad():
        assert not fastvq.vector_quantize(x, codebook, backend=backend)[0].requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_their_inputs(backend, dtype):
    x, codebook = make("gaussian", 40, 12, 6, dtype, seed=4)
    upstream = torch.randn(40, 6).to(x.dtype)
    options = {"commitment_weight": 0.25, "codebook_weight": 1.0}
    found = gradients(fastvq.vector_quantize, x, codebook, upstream, 1.0, **options, backend=backend)
    truth = gradients(naive, x.double(), codebook.double(), upstream.double(), 1.0, **options)
    for mine, right, like in zip(found, truth, (x, codebook), strict=True):
        assert mine.dtype == like.dtype
        # Rounded once to the input's dtype.
        torch.testing.assert_close(mine, right.to(like.dtype), rtol=torch.finfo(like.dtype).eps, atol=1e-7)


# ---- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_takes_rows_out_of_the_loss_alone(backend, dtype):
    x, codebook = make("gaussian", 90, 20, 6, dtype, seed=5)
    mask = torch.rand(90) < 0.6
    whole = fastvq.vector_quantize(x, codebook, backend=backend)
    part = fastvq.vector_quantize(x, codebook, mask=mask, backend=backend)
    assert_same_bits(part[0], whole[0])
    assert_same_indices(part[1], whole[1])
    torch.testing.assert_close(part[2], fastvq.vector_quantize(x[mask], codebook, backend=backend)[2])
    assert part[2] != whole[2]
    everything = torch.ones(90, dtype=torch.bool)
    assert_same_bits(fastvq.vector_quantize(x, codebook, mask=everything, backend=backend)[2], whole[2])


def test_a_masked_row_may_hold_anything(backend):
    """Padding often holds NaN; it must reach neither the loss nor any gradient but its own straight-through one."""
    x, codebook = torch.randn(10, 4), torch.randn(7, 4)
    mask = torch.arange(10) != 3
    wanted = gradients(fastvq.vector_quantize, x, codebook, torch.ones(10, 4), 1.0, mask=mask, codebook_weight=1.0)
    x[3] = torch.nan
    options = {"mask": mask, "codebook_weight": 1.0, "backend": backend}
    assert fastvq.vector_quantize(x, codebook, **options)[2].isfinite()
    found = gradients(fastvq.vector_quantize, x, codebook, torch.ones(10, 4), 1.0, **options)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows", [0, 8])
def test_without_any_row_the_loss_and_its_gradients_are_zero(backend, rows):
    x, codebook = torch.randn(rows, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    mask = torch.zeros(rows, dtype=torch.bool) if rows else None
    quantized, indices, loss = fastvq.vector_quantize(x, codebook, codebook_weight=1.0, mask=mask, backend=backend)
    assert quantized.shape == (rows, 4)
    assert indices.shape == (rows,)
    assert loss.item() == 0.0
    grad_x, grad_codebook = torch.autograd.grad(loss, [x, codebook])
    assert grad_x.shape == x.shape
    assert grad_x.eq(0).all()
    assert grad_codebook.eq(0).all()


@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_masks_of_any_strides(backend, layout):
    x, codebook = torch.randn(6, 8, 4), torch.randn(5, 4)
    base = torch.rand(6, 16) < 0.5
    mask = base[:, :1].expand(6, 8) if layout == "expanded" else base[:, ::2]
    found = fastvq.vector_quantize(x, codebook, mask=mask, backend=backend)[2]
    torch.testing.assert_close(found, naive(x, codebook, mask=mask.contiguous())[2])


# ---- counts -----------------------------------------------------------------------------------------------------


def check_counts(backend, x, codebook, mask=None, **options):
    """The counts beside the other outputs as they are without, and those of `code_sums` for rows that are finite."""
    plain = fastvq.vector_quantize(x, codebook, mask=mask, **options, backend=backend)
    *same, counts = fastvq.vector_quantize(x, codebook, mask=mask, **options, return_counts=True, backend=backend)
    for mine, right in zip(same, plain, strict=True):
        assert_same_bits(mine, right)
    finite = x.isfinite().all(-1)
    kept = finite if mask is None else finite & mask
    heads = codebook.dim() == 3
    wanted, _ = fastvq.code_sums(x, plain[1], codebook.shape[-2], mask=kept, per_head=heads, backend=backend)
    assert counts.dtype == torch.int64
    assert counts.tolist() == wanted.tolist()
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["clustered", "not_finite", "huge", "largest"])
def test_counts_are_those_of_code_sums(backend, family, dtype):
    for n, k, d in ((252, 33, 7), (45, 1, 1), (1, 7, 64)):
        x, codebook = make(family, n, k, d, dtype, seed=n)
        mask = torch.rand(n) < 0.6
        check_counts(backend, x, codebook)
        check_counts(backend, x, codebook, mask, metric="dot")
        x[mask.logical_not().logical_and(torch.rand(n) < 0.5)] = torch.nan
        check_counts(backend, x, codebook, mask)


def test_a_row_that_is_not_finite_is_not_counted(backend):
    x, codebook = torch.randn(9, 40), torch.randn(5, 40)
    x[2, 39], x[4, 0], x[5, 17], x[5, 18] = torch.nan, torch.inf, -torch.inf, torch.inf
    assert check_counts(backend, x, codebook).sum() == 6
    everything = torch.full((9, 40), torch.nan)
    assert check_counts(backend, everything, codebook).tolist() == [0] * 5
    assert check_counts(backend, x, everything[:5]).tolist() == [6, 0, 0, 0, 0]  # no code is nearest: the first


def test_counts_of_heads_strides_and_no_rows(backend):
    x, codebook = make("gaussian", 30, 9, 6, seed=6, heads=3)
    mask = torch.rand(3, 5, 6) < 0.5
    assert check_counts(backend, x.reshape(3, 5, 6, 6), codebook, mask).shape == (3, 9)
    images = torch.randn(3, 6, 5, 7)
    check_counts(backend, images.permute(0, 2, 3, 1), torch.randn(6, 40).t(), (torch.rand(3, 5, 14) < 0.5)[..., ::2])
    check_counts(backend, torch.randn(6).expand(50, 6), codebook[0].bfloat16())
    assert check_counts(backend, x[:, :0], codebook).tolist() == [[0] * 9] * 3
    assert check_counts(backend, x[0, :0], codebook[0], mask[0, 0, :0]).tolist() == [0] * 9


# Codes of a few rows: of so many that threads count together, and so few that each counts by itself.
@pytest.mark.parametrize(("n", "k"), [(9001, 130), (200, 1 << 18)])
def test_counts_on_many_threads(n, k):
    x, codebook = torch.randn(n, 2), torch.randn(k, 2)
    codebook[k // 2 :] = codebook[0]
    x[::2] = codebook[0]
    for number in (1, 2, 7):
        with threads(number):
            assert check_counts("cpu", x, codebook)[0] >= n // 2


def test_counts_stay_exact_where_float32_stops():
    n = (1 << 24) + 1
    *_, counts = fastvq.vector_quantize(torch.ones(1).expand(n, 1), torch.ones(1, 1), return_counts=True, backend="cpu")
    assert counts.tolist() == [n]


def test_counts_have_no_gradient(backend):
    x, codebook = make("gaussian", 30, 9, 4, "float64", seed=3)
    upstream = torch.randn_like(x)
    wanted = gradients(fastvq.vector_quantize, x, codebook, upstream, 2.0, codebook_weight=0.5, backend=backend)

    def counted(x, codebook):
        *outputs, counts = fastvq.vector_quantize(x, codebook, codebook_weight=0.5, return_counts=True, backend=backend)
        assert not counts.requires_grad
        return outputs

    for mine, right in zip(gradients(counted, x, codebook, upstream, 2.0), wanted, strict=True):
        assert_same_bits(mine, right)


# ---- layouts, heads, threads ------------------------------------------------------------------------------------


def test_strided_inputs_and_gradients(backend):
    images = torch.randn(3, 8, 5, 7, requires_grad=True)
    codebook = torch.randn(8, 40).t().requires_grad_()
    upstream = torch.randn(3, 8, 5, 7).permute(0, 2, 3, 1)
    options = {"commitment_weight": 0.5, "codebook_weight": 1.5}
    x = images.permute(0, 2, 3, 1)
    results = []
    for function, extra in ((fastvq.vector_quantize, {"backend": backend}), (naive, {})):
        quantized, indices, loss = function(x, codebook, **options, **extra)
        grads = torch.autograd.grad((quantized * upstream).sum() + loss, [images, codebook])
        results.append((quantized.detach(), indices, loss.detach(), *grads))
    torch.testing.assert_close(*results)
    # An upstream gradient of stride 0, as sum() gives.
    quantized, _, _ = fastvq.vector_quantize(x, codebook, backend=backend)
    (grad,) = torch.autograd.grad(quantized.sum(), [images])
    assert grad.eq(1).all()


def test_heads_are_quantised_by_their_own_codebooks(backend):
    x, codebook = make("gaussian", 30, 9, 5, "float64", seed=6, heads=3)
    x = x.reshape(3, 5, 6, 5)
    mask = torch.rand(3, 5, 6) < 0.5
    upstream = torch.randn_like(x)
    options = {"commitment_weight": 0.5, "codebook_weight": 1.5}
    quantized, indices, loss = fastvq.vector_quantize(x, codebook, **options, mask=mask, backend=backend)
    x_grad, codebook_grad = gradients(
        fastvq.vector_quantize, x, codebook, upstream, 1.0, **options, mask=mask, backend=backend
    )
    total = 0.0
    for head in range(3):
        q, i, _ = naive(x[head], codebook[head])
        assert_same_indices(indices[head], i)
        torch.testing.assert_close(quantized[head], q)
        kept = mask[head]
        share = kept.sum() / mask.sum()
        total = total + share * naive(x[head], codebook[head], **options, mask=kept)[2]
        wanted = gradients(naive, x[head], codebook[head], upstream[head], share, **options, mask=kept)
        torch.testing.assert_close((x_grad[head], codebook_grad[head]), wanted)
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_depends_on_the_number_of_threads(backend, dtype):
    x, codebook = make("gaussian", 9001, 130, 24, dtype, seed=7)
    upstream = torch.randn(9001, 24).to(x.dtype)
    mask = torch.rand(9001) < 0.9
    results = []
    for number in (1, 2, 3, 2):
        with threads(number):
            options = {"codebook_weight": 1.0, "mask": mask, "backend": backend}
            outputs = fastvq.vector_quantize(x, codebook, **options)
            results.append((*outputs, *gradients(fastvq.vector_quantize, x, codebook, upstream, 1.0, **options)))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same_bits(second, first)


def test_autocast_changes_nothing(backend):
    x, codebook = make("offset", 300, 60, 12, seed=8)
    wanted = fastvq.vector_quantize(x, codebook, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastvq.vector_quantize(x, codebook, backend=backend)
    for mine, right in zip(found, wanted, strict=True):
        assert_same_bits(mine, right)


def test_the_quantised_rows_are_no_view_of_the_codebook(backend):
    """Who writes into the result must not change the codes."""
    x, codebook = torch.randn(5, 3), torch.randn(1, 3)
    before = codebook.clone()
    fastvq.vector_quantize(x, codebook, backend=backend)[0].zero_()
    assert torch.equal(codebook, before)


def test_a_codebook_changed_before_backward_is_refused_not_used(backend):
    x, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(6, 4)
    _, _, loss = fastvq.vector_quantize(x, codebook, backend=backend)
    state = torch.ones(6), codebook.clone()
    fastvq.ema_update_(codebook, *state, torch.ones(6), torch.randn(6, 4), decay=0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_right_or_refused(backend):
    """Never silently left out, as in a gradient penalty whose other terms hide that."""
    x, codebook = make("gaussian", 9, 6, 4, "float64", seed=9)
    x.requires_grad_()

    def second(loss):
        (grad,) = torch.autograd.grad(loss + x.pow(3).sum(), [x], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x])

    wanted = second(naive(x, codebook)[2])
    with contextlib.suppress(RuntimeError):
        found = second(fastvq.vector_quantize(x, codebook, backend=backend)[2])
        torch.testing.assert_close(found, wanted)
