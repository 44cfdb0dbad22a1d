"""Functions of all logits of a row against the formulas as everybody writes them, with an N x K matrix, in float64."""

import itertools

import pytest
import torch
from torch.nn import functional

from fastvq import streaming

SHAPES = [(1, 1, 1, 1), (1, 7, 1, 3), (2, 23, 13, 4), (1, 3, 257, 31), (3, 0, 5, 2)]  # heads, rows, codes, dim


@pytest.fixture(params=[None, (64, 5)], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """As it is, and in blocks so small that every loop runs many times."""
    if request.param is not None:
        monkeypatch.setitem(streaming._BLOCK, "cpu", request.param[0])
        monkeypatch.setattr(streaming, "_CODES", request.param[1])


def naive_logits(x, codes, metric):
    if metric != "euclidean":
        return x @ codes.transpose(-1, -2)
    squares = (x.unsqueeze(-2) - codes.unsqueeze(-3)).square().sum(-1)
    return -squares.clamp(min=1e-8).sqrt()


def draw(heads, rows, codes, dim, offset=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows + codes)
    x, book = (torch.randn(heads, n, dim, generator=generator, dtype=torch.float64) + offset for n in (rows, codes))
    return x.to(dtype).requires_grad_(), book.to(dtype).requires_grad_()


def cross_entropy(x, codes, metric, scale):
    """Ours and the naive one, (H, N)."""
    targets = torch.randint(-1, codes.shape[1], x.shape[:2], generator=torch.Generator().manual_seed(0))
    logits = naive_logits(x, codes, metric).transpose(1, 2) * scale
    yield streaming.cross_entropy(x, codes, targets, metric=metric, scale=scale)
    yield functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def mean_choice_entropy(x, codes, metric, scale):
    """Ours and the naive one, of one, or two, rows at each place."""
    groups = 2 if x.shape[1] % 2 == 0 else 1
    grouped = x.unflatten(1, (groups, x.shape[1] // groups))
    weights = torch.rand(grouped.shape[:3], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    weights = weights / weights.sum((0, 1))
    yield streaming.mean_choice_entropy(grouped, codes, weights, metric=metric, scale=scale)
    chances = (naive_logits(grouped, codes.unsqueeze(1), metric) * scale).softmax(-1)
    mean = (chances * weights.unsqueeze(-1)).sum((0, 1))
    yield -(mean * mean.clamp(min=1e-5).log()).sum(-1)


def mean_code(x, codes, metric, scale):
    """Ours and the naive one, (H, N, D)."""
    yield streaming.mean_code(x, codes, metric=metric, scale=scale)
    yield (naive_logits(x, codes, metric) * scale).softmax(-1) @ codes


@pytest.mark.parametrize("function", [cross_entropy, mean_choice_entropy, mean_code])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_naive_ones(function, metric, shape, blocks):
    for scale in (1.0, 7.0):
        x, codes = draw(*shape)
        ours, naive = function(x, codes, metric, scale)
        torch.testing.assert_close(ours, naive, rtol=1e-11, atol=1e-12)
        weights = torch.randn(naive.shape, generator=torch.Generator().manual_seed(1), dtype=naive.dtype)
        gradients = [torch.autograd.grad(value, (x, codes), weights) for value in (ours, naive)]
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("function", [cross_entropy, mean_code])
def test_a_row_on_its_code_has_no_gradient_from_it(function):
    """The distance has none there; the naive formula stops it by its clamp, as ours must."""
    x, codes = draw(1, 4, 6, 3)
    with torch.no_grad():
        x[0, 1] = codes[0, 2]
    ours, naive = function(x, codes, "euclidean", 2.0)
    gradients = [torch.autograd.grad(value.sin().sum(), (x, codes)) for value in (ours, naive)]
    for mine, other in zip(*gradients, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("function", [cross_entropy, mean_choice_entropy, mean_code])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32_is_no_worse_than_the_plain_formula(function, offset):
    """The errors of both against float64, at an offset too, where |x|^2 + |c|^2 - 2 x c alone would lose everything."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        x, codes = (t.detach().to(torch.float32).to(dtype).requires_grad_() for t in draw(1, 200, 300, 17, offset))
        for name, value in zip(("ours", "naive"), function(x, codes, "euclidean", 3.0), strict=True):
            gradients = torch.autograd.grad(value.sin().sum(), (x, codes))
            found[name, dtype] = [value.detach(), *gradients]
    for ours, naive, exact in zip(
        found["ours", torch.float32], found["naive", torch.float32], found["naive", torch.float64], strict=True
    ):
        assert (ours - exact).abs().max() <= 3 * (naive - exact).abs().max() + 2e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_computed_in_float32(dtype):
    x, codes = draw(1, 9, 20, 5)
    narrow_x, narrow_codes = x.detach().to(dtype).requires_grad_(), codes.detach().to(dtype).requires_grad_()
    wide_x, wide_codes = (t.detach().float().requires_grad_() for t in (narrow_x, narrow_codes))
    for function in (cross_entropy, mean_choice_entropy, mean_code):
        with torch.autocast("cpu", torch.bfloat16):
            narrow = next(function(narrow_x, narrow_codes, "euclidean", 2.0))
        wide = next(function(wide_x, wide_codes, "euclidean", 2.0))
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(narrow.sum(), narrow_x)
        assert gradient.dtype == dtype
        (other,) = torch.autograd.grad(wide.sum(), wide_x)
        torch.testing.assert_close(gradient.float(), other, rtol=1e-2, atol=1e-2)


def test_registered_operators_pass_opcheck():
    x, codes = (t.detach().requires_grad_() for t in draw(2, 6, 5, 3))
    targets = torch.tensor([[0, 4, -1, 2, 2, 1]]).expand(2, 6)
    weights = torch.rand(2, 2, 3, dtype=torch.float64)
    grouped = x.detach().view(2, 2, 3, 3).requires_grad_()
    operators = torch.ops.fastvq
    for operator, arguments in (
        (operators.code_cross_entropy, (x, codes, targets, "euclidean", 1.5)),
        (operators.code_entropy, (grouped, codes, weights, "euclidean", 1.5)),
        (operators.mean_code, (x, codes, "cosine", 1.5)),
        (operators.nearest_codes, (x.detach(), codes.detach(), 2, "euclidean")),
        (operators.sample_codes, (x.detach(), codes.detach(), torch.tensor(7), 2, "euclidean", 0.5)),
    ):
        torch.library.opcheck(operator, arguments)


def test_indices_past_the_codes_are_refused():
    x, codes = draw(1, 3, 4, 2)
    with pytest.raises(ValueError, match="indices must be below codebook_size = 4; got 4"):
        streaming.cross_entropy(x, codes, torch.tensor([[0, 4, 1]]), metric="euclidean")


def test_blocks_cover_everything_once():
    for total, step in itertools.product([0, 1, 5, 6], [0, 1, 2, 5, 9]):
        covered = [i for span in streaming.spans(total, step) for i in range(span.start, span.stop)]
        assert covered == list(range(total))
