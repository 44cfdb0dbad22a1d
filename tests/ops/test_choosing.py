"""The k nearest codes against the specification, and codes drawn at random against their chances."""

import math

import pytest
import torch

from fastvq import choosing, streaming
from fastvq.backends import reference


def all_scores(x, codes, metric):
    """What is minimised, (N, K), in the arithmetic of the specification."""
    return torch.where((s := reference._scores(x.double(), codes.double(), metric)).isnan(), torch.inf, s)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("rows", "codes", "dim", "k"), [(1, 1, 1, 1), (7, 23, 3, 23), (252, 1023, 7, 5), (33, 130, 60, 40), (0, 4, 2, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_k_nearest_are_those_of_the_specification(metric, rows, codes, dim, k, dtype):
    x = torch.randn(2, rows, dim).to(dtype)
    books = torch.randn(2, codes, dim).to(dtype)
    books[:, codes // 2 :] = books[:, : codes - codes // 2]  # every code twice
    found = choosing.nearest_codes(x, books, k, metric=metric)
    for head in range(2):
        wanted = all_scores(x[head], books[head], metric).sort(dim=1, stable=True).indices[:, :k]
        assert torch.equal(found[head], wanted)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_nearest_is_that_of_search(offset):
    x, books = torch.randn(1, 300, 9) / 100 + offset, torch.randn(1, 64, 9) / 100 + offset
    nearest = choosing.nearest_codes(x, books, 3, metric="euclidean")[..., 0]
    assert torch.equal(nearest, reference.search(x, books, "euclidean", False, "exact")[0])


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("family", ["all equal", "by the dozen", "near ties", "one apart", "not finite"])
def test_more_ties_than_candidates(metric, family):
    """More codes than are kept for a second look lie as near, or nearly so."""
    codes = torch.randn(1, 300, 5, dtype=torch.float64)
    x = torch.randn(1, 64, 5, dtype=torch.float64)
    if family == "all equal":
        codes[:] = codes[:, :1]
    elif family == "by the dozen":
        codes = codes[:, torch.randint(6, (300,))]
    elif family == "not finite":
        codes[0, 3:9], codes[0, 20:290, 1], x[0, 5, 2] = torch.inf, torch.nan, torch.nan
    else:
        codes = codes[:, :1] + 1e-16 * codes
        x = x + 100
    if family == "one apart":
        codes[0, 170] = x[0, 0]
    found = choosing.nearest_codes(x, codes, 4, metric=metric)[0]
    wanted = all_scores(x[0], codes[0], metric).sort(dim=1, stable=True).indices[:, :4]
    assert torch.equal(found, wanted)


def test_nan_rows_and_codes():
    x, codes = torch.randn(1, 5, 3), torch.randn(1, 40, 3)
    x[0, 2, 1] = torch.nan
    codes[0, 7] = torch.nan
    found = choosing.nearest_codes(x, codes, 4, metric="euclidean")[0]
    assert found[2].tolist() == [0, 1, 2, 3]
    assert not (found == 7).any()
    assert choosing.sample_codes(x, codes, metric="euclidean", temperature=1.0)[0, 2].tolist() == [0]


def chances(x, codes, temperature):
    return (-torch.cdist(x.double(), codes.double()) / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_codes_are_drawn_by_their_chances(temperature):
    """Pearson's chi-square of 40,000 draws for the same row: within 5 standard deviations of its mean."""
    many, codes = 40_000, torch.randn(1, 20, 4)
    x = torch.randn(1, 1, 4).expand(1, many, 4)
    drawn = choosing.sample_codes(x, codes, metric="euclidean", temperature=temperature)
    counts = torch.bincount(drawn.flatten(), minlength=20).double()
    expected = many * chances(x[0, :1], codes[0], temperature)[0]
    kept = expected >= 5
    assert counts[~kept].sum() <= expected[~kept].sum() + 5 * expected[~kept].sum().sqrt() + 5
    square = ((counts - expected).square() / expected)[kept].sum()
    freedom = int(kept.sum()) - 1
    assert freedom >= 3
    assert square < freedom + 5 * math.sqrt(2 * freedom)


def test_the_chi_square_test_can_fail():
    """Draws at another temperature: the statistic is far outside."""
    codes = torch.randn(1, 20, 4)
    x = torch.randn(1, 1, 4).expand(1, 40_000, 4)
    counts = torch.bincount(choosing.sample_codes(x, codes, metric="euclidean", temperature=1.2).flatten()).double()
    expected = 40_000 * chances(x[0, :1], codes[0], 1.0)[0, : len(counts)]
    assert ((counts - expected).square() / expected).sum() > 19 + 5 * math.sqrt(38)


def test_several_codes_are_drawn_without_replacement():
    """The second draw has the chances that are left when the first is taken."""
    codes = torch.randn(1, 6, 3)
    x = torch.randn(1, 1, 3).expand(1, 60_000, 3)
    first, second = choosing.sample_codes(x, codes, metric="euclidean", temperature=1.0, k=2)[0].unbind(-1)
    assert (first != second).all()
    p = chances(x[0, :1], codes[0], 1.0)[0]
    pairs = torch.bincount(first * 6 + second, minlength=36).view(6, 6).double()
    expected = 60_000 * p[:, None] * p[None] / (1 - p[:, None])
    expected.fill_diagonal_(0)
    off = expected >= 5
    assert ((pairs - expected).square() / expected)[off].sum() < off.sum() + 5 * math.sqrt(2 * off.sum())


def test_the_noise_does_not_depend_on_the_blocks(monkeypatch):
    x, codes = torch.randn(2, 70, 5), torch.randn(2, 90, 5)
    torch.manual_seed(3)
    whole = choosing.sample_codes(x, codes, metric="euclidean", temperature=1.0, k=3)
    monkeypatch.setitem(streaming._BLOCK, "cpu", 100)
    monkeypatch.setattr(streaming, "_CODES", 7)
    torch.manual_seed(3)
    assert torch.equal(choosing.sample_codes(x, codes, metric="euclidean", temperature=1.0, k=3), whole)
    assert not torch.equal(choosing.sample_codes(x, codes, metric="euclidean", temperature=1.0, k=3), whole)
    assert not torch.equal(whole[0], whole[1])


def test_the_noise_is_gumbel_and_uncorrelated():
    noise = choosing._gumbel(torch.tensor(5), 0, slice(0, 1000), slice(0, 1000), torch.float64)
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    ordered = torch.exp(-torch.exp(-noise.flatten())).sort().values  # uniform: Kolmogorov and Smirnov's statistic
    assert (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max() < 1.95 / 1000
    centred = noise - noise.mean()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred * centred.t()):
        assert abs(shifted.mean()) < 5 * 1.65 / 1000 + (2e-3 if shifted.shape == noise.shape else 0)
    part = choosing._gumbel(torch.tensor(5), 0, slice(300, 310), slice(777, 790), torch.float64)
    assert torch.equal(part, noise[300:310, 777:790])
