"""code_sums: exact counts, and sums in float64 in the order of the rows, rounded once."""

import pytest
import torch
from compare import assert_no_less_exact, assert_same_bits, threads
from families import DTYPES, FAMILIES, make

import fastvq
from fastvq.backends.rows import finite_rows


def naive(x, indices, size):
    """One-hot^T matmul."""
    one_hot = torch.nn.functional.one_hot(indices, size).to(x.dtype)
    return one_hot.sum(0), one_hot.t() @ x


def by_definition(x, indices, size, mask=None):
    """Row after row, in float64."""
    counts, sums = torch.zeros(size, dtype=torch.float64), torch.zeros(size, x.shape[-1], dtype=torch.float64)
    rows, codes = x.reshape(-1, x.shape[-1]).double(), indices.flatten().tolist()
    kept = [True] * len(codes) if mask is None else mask.flatten().tolist()
    for row, code, keep in zip(rows, codes, kept, strict=True):
        if keep and code >= 0:
            counts[code] += 1
            sums[code] += row
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    return counts.to(working), sums.to(working)


def check(found, wanted, what=""):
    assert_same_bits(found[0], wanted[0], f"{what} counts")
    assert_same_bits(found[1], wanted[1], f"{what} sums")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_sums_are_those_of_the_definition(backend, family, dtype):
    for n, k, d in ((211, 7, 5), (60, 100, 33), (9, 1, 1)):
        x, _ = make(family, n, 1, d, dtype, seed=n)
        indices = torch.randint(-1, k, (n,))
        check(fastvq.code_sums(x, indices, k, backend=backend), by_definition(x, indices, k), f"{n, k, d}")


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"huge", "largest", "not_finite"}))
def test_sums_are_no_less_exact_than_plain_torch(backend, family):
    x, _ = make(family, 5003, 1, 17, seed=1)
    indices = torch.randint(23, (5003,))
    found, plain, truth = fastvq.code_sums(x, indices, 23, backend=backend), naive(x, indices, 23), None
    truth = naive(x.double(), indices, 23)
    for mine, theirs, right in zip(found, plain, truth, strict=True):
        assert_no_less_exact(mine, theirs, right, slack=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 300, 70_000])
def test_sums_are_bit_for_bit_the_same_on_any_number_of_threads(backend, size, dtype):
    x, _ = make("scaled_rows", 20_011, 1, 24, dtype, seed=2)
    indices = (torch.rand(20_011).square() * size).long()  # some codes far more often than others
    with threads(1):
        wanted = fastvq.code_sums(x, indices, size, backend="reference")
    for number in (1, 2, 3, 2):
        with threads(number):
            check(fastvq.code_sums(x, indices, size, backend=backend), wanted, f"{number} threads")


def test_masked_rows_and_index_minus_one_are_left_out(backend):
    x = torch.randn(4, 15, 6)
    indices = torch.randint(-1, 8, (4, 15))
    mask = torch.rand(4, 15) < 0.5
    x[~mask] = torch.nan
    found = fastvq.code_sums(x, indices, 8, mask=mask, backend=backend)
    check(found, by_definition(x, indices, 8, mask))
    assert found[1].isfinite().all()
    empty = fastvq.code_sums(x, indices, 8, mask=torch.zeros_like(mask), backend=backend)
    check(empty, (torch.zeros(8), torch.zeros(8, 6)))
    empty = fastvq.code_sums(x, torch.full_like(indices, -1), 8, backend=backend)
    check(empty, (torch.zeros(8), torch.zeros(8, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_that_are_not_finite_are_left_out_where_asked_for(backend, dtype):
    """Whether rows lie one after another or side by side; rows whose sum alone is infinite are kept."""
    x = torch.randn(2, 53, 6).to(dtype)
    x[0, 3], x[0, 8, 2], x[1, 5, 5], x[1, 6, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
    x[0, 20:22] = torch.finfo(dtype).max
    indices = torch.randint(-1, 4, (2, 53))
    indices[0, 20:22] = 1
    mask = torch.rand(2, 53) < 0.8
    with fastvq.use_backend(backend):
        for rows in (x, x.mT.contiguous().mT):
            for given in (None, mask):
                kept = x.isfinite().all(-1) if given is None else x.isfinite().all(-1) & given
                found = torch.ops.fastvq.finite_code_sums(rows, indices, 4, given, False, None)
                check(found, by_definition(x, indices, 4, kept))
                found = torch.ops.fastvq.finite_code_sums(rows, indices, 4, given, True, None)
                for h in range(2):
                    check([part[h] for part in found], by_definition(x[h], indices[h], 4, kept[h]))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_leading_shapes(backend, shape):
    x, indices = torch.randn(*shape, 6), torch.randint(9, shape)
    check(fastvq.code_sums(x, indices, 9, backend=backend), by_definition(x, indices, 9))


def test_heads_are_summed_by_themselves(backend):
    x, indices, mask = torch.randn(3, 5, 7, 6), torch.randint(-1, 9, (3, 5, 7)), torch.rand(3, 5, 7) < 0.7
    counts, sums = fastvq.code_sums(x, indices, 9, mask=mask, per_head=True, backend=backend)
    assert counts.shape == (3, 9)
    assert sums.shape == (3, 9, 6)
    for head in range(3):
        check((counts[head], sums[head]), by_definition(x[head], indices[head], 9, mask[head]), f"head {head}")


def test_strided_inputs(backend):
    images = torch.randn(3, 6, 5, 7)
    x = images.permute(0, 2, 3, 1)
    indices = torch.randint(9, (7, 3, 5)).permute(1, 2, 0)
    mask = (torch.rand(3, 5, 14) < 0.5)[..., ::2]
    wanted = by_definition(x.contiguous(), indices.contiguous(), 9, mask)
    check(fastvq.code_sums(x, indices, 9, mask=mask, backend=backend), wanted)
    check(
        fastvq.code_sums(x[:1, :1, :1].expand(3, 5, 7, 6), indices, 9, backend=backend),
        by_definition(x[:1, :1, :1].expand(3, 5, 7, 6), indices, 9),
    )
    assert torch._neg_view(x).is_neg()
    check(fastvq.code_sums(torch._neg_view(x), indices, 9, backend=backend), by_definition(-x, indices, 9))


def test_a_million_of_one_code_is_counted_exactly(backend):
    """float32 would stop counting ones at 2^24, and lose small addends long before."""
    x = torch.full((1, 1), 0.1).expand((1 << 24) + 3, 1)
    counts, sums = fastvq.code_sums(x, torch.zeros(len(x), dtype=torch.int64), 1, backend=backend)
    exact = torch.tensor(0.1).double() * len(x)
    assert counts.item() == torch.tensor(float(len(x))).item()
    torch.testing.assert_close(sums.double().squeeze(), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("index", [9, 2**40])
def test_an_index_past_the_codebook_is_refused(backend, index):
    indices = torch.zeros(40, dtype=torch.int64)
    indices[33] = index
    with pytest.raises(ValueError, match=rf"indices.*9.*{index}"):
        fastvq.code_sums(torch.randn(40, 4), indices, 9, backend=backend)


def test_sums_have_no_gradient(backend):
    x = torch.randn(5, 3, requires_grad=True)
    counts, sums = fastvq.code_sums(x, torch.zeros(5, dtype=torch.int64), 2, backend=backend)
    assert not counts.requires_grad
    assert not sums.requires_grad


def test_which_rows_are_finite():
    """Also one whose own sum overflows."""
    x = torch.tensor([[3e38, 3e38], [1.0, torch.nan], [torch.inf, -torch.inf], [-torch.inf, 0.0], [0.0, -1.0]])
    assert finite_rows(x, None).tolist() == [True, False, False, False, True]
    assert finite_rows(x.bfloat16(), torch.tensor([False, True, True, True, True])).tolist() == [False] * 4 + [True]
