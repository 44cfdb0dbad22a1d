"""The comparators notice what they are there to notice, and the data families are what they claim."""

import pytest
import torch
from compare import SIZES, Case, assert_no_less_exact, assert_same_bits, assert_same_indices, check, grid, whole_grid
from families import DTYPES, FAMILIES, HUGE, TINY, make

from fastvq.backends import reference


@pytest.mark.parametrize("row", [0, 511, 1022])
def test_one_wrong_index_is_noticed(row):
    expected = torch.arange(1023)
    found = expected.clone()
    assert_same_indices(found, expected)
    found[row] += 1
    with pytest.raises(AssertionError, match=rf"case: 1 of 1023 indices differ, first at \({row},\)"):
        assert_same_indices(found, expected, "case")


def test_other_dtypes_and_shapes_are_noticed():
    expected = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(AssertionError, match="int32"):
        assert_same_indices(expected.int(), expected)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_indices(expected[:3], expected)
    with pytest.raises(AssertionError, match="float64"):
        assert_same_bits(torch.zeros(4).double(), torch.zeros(4))
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(torch.zeros(4), torch.zeros(4, 1))


@pytest.mark.parametrize("other", [-0.0, torch.nan, torch.finfo(torch.float32).tiny])
def test_one_wrong_bit_is_noticed(other):
    expected = torch.tensor([0.0, torch.nan, 1.0])
    assert_same_bits(expected.clone(), expected)
    found = expected.clone()
    found[0] = other
    with pytest.raises(AssertionError, match=r"1 of 3 values differ, first at \(0,\)"):
        assert_same_bits(found, expected)


def test_a_larger_error_than_plain_torchs_is_noticed():
    truth = torch.ones(3, dtype=torch.float64)
    plain = torch.ones(3) * (1 + 1e-6)
    assert_no_less_exact(torch.ones(3) * (1 + 1e-6), plain, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_no_less_exact(torch.ones(3) * (1 + 1e-5), plain, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_no_less_exact(torch.full((3,), torch.nan), plain, truth)


def test_the_check_of_a_case_notices_a_backend_that_is_wrong_in_one_row(monkeypatch):
    case = Case("gaussian", "float32", n=50, k=64, d=8, seed=0)
    check(case, "reference")
    right = reference.search
    calls = []

    def wrong_at_first(*arguments):
        indices, distances = right(*arguments)
        if not calls:
            indices[49] += 1
        calls.append(None)
        return indices, distances

    monkeypatch.setattr(reference, "search", wrong_at_first)
    with pytest.raises(AssertionError, match=r"1 of 50 indices differ, first at \(49,\)"):
        check(case, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_deterministic_and_differ_by_seed(family, dtype):
    first, again, other = (make(family, 40, 30, 12, dtype, seed) for seed in (0, 0, 1))
    for tensor, same, want in zip(first, again, DTYPES[dtype], strict=True):
        assert tensor.dtype == want
        assert_same_bits(same, tensor)
        assert family == "not_finite" or tensor.isfinite().all()
    if family != "zeros":
        assert not torch.equal(first[0], other[0])


def test_families_are_what_they_claim():
    _, codes = make("duplicated", 1, 64, 8)
    assert len(codes.unique(dim=0)) < 40
    _, codes = make("near_tied", 1, 64, 8)
    gaps = torch.cdist(codes.double(), codes.double()) / codes.double().norm(dim=1)
    assert ((gaps > 1e-8) & (gaps < 1e-6)).sum() > 100
    for dtype, (x_dtype, code_dtype) in DTYPES.items():
        x, codes = make("huge", 64, 64, 8, dtype)
        assert x.abs().max() > HUGE[x_dtype]
        assert codes.abs().max() > HUGE[code_dtype]
        x, codes = make("tiny", 64, 64, 8, dtype)
        assert 0 < x.abs().max() < 10 * TINY[x_dtype]
        assert 0 < codes.abs().max() < 10 * TINY[code_dtype]
    x, codes = make("not_finite", 64, 64, 8)
    assert all(test(t).any() for t in (x, codes) for test in (torch.isnan, torch.isposinf, torch.isneginf))
    heads = make("gaussian", 5, 4, 3, heads=2)
    assert [t.shape for t in heads] == [(2, 5, 3), (2, 4, 3)]
    assert not torch.equal(heads[0][0], heads[0][1])


def test_the_grid_holds_what_the_claim_names():
    cases = list(whole_grid(100, 9))
    assert {c.d for c in cases} >= {1, 2, 3, 7, 8, 16, 31, 64, 127, 256, 1000}
    assert {c.k for c in cases} == set(SIZES) == {1, 2, 7, 64, 1000, 8192}
    assert {c.family for c in cases} == set(FAMILIES)
    assert {c.dtype for c in cases} == set(DTYPES)
    assert min(c.n for c in cases) == 5
    assert len({c.seed for c in grid("gaussian", "float32", 100, 9)}) == 13 * 6
