"""ema_update_ and ema_step_: the formula of the paper, in place, each stored value rounded once."""

import pytest
import torch
from compare import assert_same_bits, threads

import fastvq

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state(k=33, d=7, dtype=torch.float32, heads=()):
    """codebook, cluster_size, embed_avg, counts, sums."""
    counts = torch.randint(5, (*heads, k)).to(dtype)
    wide = [torch.randn(*heads, k, d).to(dtype) for _ in range(3)]
    return [wide[0], (torch.rand(*heads, k) * 9 + 0.1).to(dtype), wide[1], counts, wide[2]]


def by_formula(codebook, cluster_size, embed_avg, counts, sums, decay, eps):
    """The three results in float64, from the inputs as they are stored."""
    size = decay * cluster_size.double() + (1 - decay) * counts.double()
    average = decay * embed_avg.double() + (1 - decay) * sums.double()
    n = size.sum(-1, keepdim=True)
    codes = average / ((size + eps) / (n + size.shape[-1] * eps) * n).unsqueeze(-1)
    return codes, size, average


@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("eps", [1e-5, 0.0, 0.1])
@pytest.mark.parametrize("decay", [0.99, 0.0, 1.0, 0.8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_results_are_those_of_the_formula_rounded_once(backend, dtype, decay, eps, heads):
    tensors = state(dtype=dtype, heads=heads)
    if eps == 0.0 and decay == 0.0:
        tensors[3].clamp_(min=1)  # without smoothing a code without rows is infinite, by the formula too
    wanted = by_formula(*tensors, decay, eps)
    given = [t.clone() for t in tensors]
    assert fastvq.ema_update_(*tensors, decay=decay, eps=eps, backend=backend) is None
    for name, found, right in zip(("codebook", "cluster_size", "embed_avg"), tensors, wanted, strict=False):
        assert found.dtype == dtype
        # Half a last place of rounding, and float64's own for the order of the sum.
        torch.testing.assert_close(
            found.double(), right.to(dtype).double(), rtol=max(torch.finfo(dtype).eps, 1e-12) / 2, atol=0, msg=name
        )
    assert_same_bits(tensors[3], given[3], "counts are only read")
    assert_same_bits(tensors[4], given[4], "sums are only read")


def test_a_hundred_steps_stay_with_the_naive_formulation(backend):
    """Search, sums and update against distance matrix, one-hot and the usual float32 EMA."""
    torch.manual_seed(1)
    x = torch.randn(100, 300, 8) + 3 * torch.randn(16, 8)[torch.randint(16, (100, 300))]
    codebook = x[0, :24].clone()
    mine = [codebook.clone(), torch.ones(24), codebook.clone()]
    theirs = [codebook.double(), torch.ones(24).double(), codebook.double()]
    for step in range(100):
        indices = fastvq.search(x[step], mine[0], backend=backend)
        assert torch.equal(indices, torch.cdist(x[step].double(), theirs[0]).argmin(1))
        fastvq.ema_update_(*mine, *fastvq.code_sums(x[step], indices, 24, backend=backend), decay=0.9, backend=backend)
        one_hot = torch.nn.functional.one_hot(indices, 24).double()
        theirs[1] = 0.9 * theirs[1] + 0.1 * one_hot.sum(0)
        theirs[2] = 0.9 * theirs[2] + 0.1 * one_hot.t() @ x[step].double()
        n = theirs[1].sum()
        theirs[0] = theirs[2] / ((theirs[1] + 1e-5) / (n + 24e-5) * n).unsqueeze(1)
    for found, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, right.float(), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("which", range(5))
def test_strided_state_is_updated_where_it_lies(backend, which):
    tensors = state(k=20, d=6)
    wanted = [t.clone() for t in tensors]
    fastvq.ema_update_(*wanted, decay=0.9, backend="reference")
    shape = tensors[which].shape
    wide = torch.full((*(2 * s for s in shape),), 7.0)
    view = wide[tuple(slice(1, None, 2) for _ in shape)]
    view.copy_(tensors[which])
    tensors[which] = view
    fastvq.ema_update_(*tensors, decay=0.9, backend=backend)
    for found, right in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1.2e-7, atol=0)
    view.fill_(7.0)
    assert wide.eq(7.0).all(), "written outside the view"


def test_a_transposed_codebook_is_updated_where_it_lies(backend):
    tensors = state(k=20, d=6)
    wanted = [t.clone() for t in tensors]
    fastvq.ema_update_(*wanted, decay=0.9, backend="reference")
    storage = tensors[0].t().contiguous()
    tensors[0] = storage.t()
    fastvq.ema_update_(*tensors, decay=0.9, backend=backend)
    torch.testing.assert_close(storage.t(), wanted[0], rtol=1.2e-7, atol=0)


def test_codes_without_rows_stay_finite(backend):
    codebook, cluster_size, embed_avg, counts, sums = state()
    cluster_size.zero_()
    counts.zero_()
    counts[3] = 2
    fastvq.ema_update_(codebook, cluster_size, embed_avg, counts, sums, decay=0.99, backend=backend)
    assert codebook.isfinite().all()


def test_heads_are_updated_by_themselves(backend):
    tensors = state(heads=(3,))
    alone = [[t[head].clone() for t in tensors] for head in range(3)]
    fastvq.ema_update_(*tensors, decay=0.7, backend=backend)
    for head in range(3):
        fastvq.ema_update_(*alone[head], decay=0.7, backend=backend)
        for found, right in zip(tensors, alone[head], strict=True):
            assert_same_bits(found[head], right, f"head {head}")


def test_threads_change_nothing(backend):
    results = []
    for number in (1, 2, 3):
        torch.manual_seed(5)
        tensors = state(k=70_001, d=5)
        with threads(number):
            fastvq.ema_update_(*tensors, decay=0.99, backend=backend)
        results.append(tensors)
    for other in results[1:]:
        for found, first in zip(other, results[0], strict=True):
            assert_same_bits(found, first)


def test_autograd_sees_the_update(backend):
    tensors = state()
    before = [t._version for t in tensors]
    fastvq.ema_update_(*tensors, decay=0.9, backend=backend)
    assert [t._version > b for t, b in zip(tensors, before, strict=True)] == [True, True, True, False, False]


def test_parameters_are_updated_too(backend):
    tensors = state()
    tensors[0] = torch.nn.Parameter(tensors[0])
    before = tensors[0].detach().clone()
    fastvq.ema_update_(*tensors, decay=0.9, backend=backend)
    assert not torch.equal(tensors[0], before)
    assert tensors[0].is_leaf


# ---- from the rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_sums_of_finite_rows_and_the_update(backend, dtype, heads, masked):
    x = torch.randn(*heads, 40, 6, 7).to(dtype)
    x[..., 3, 2, 1], x[..., 5, 0, 6] = torch.nan, -torch.inf
    indices = torch.randint(-1, 33, x.shape[:-1])
    mask = torch.rand(x.shape[:-1]) < 0.8 if masked else None
    finite = x.isfinite().all(-1)
    mine = state(heads=heads)[:3]
    wanted = [t.clone() for t in mine]
    sums = fastvq.code_sums(
        x, indices, 33, mask=finite if mask is None else finite & mask, per_head=bool(heads), backend=backend
    )
    fastvq.ema_update_(*wanted, *sums, decay=0.9, backend=backend)
    before = [t._version for t in mine]
    counts = fastvq.ema_step_(*mine, x, indices, decay=0.9, mask=mask, backend=backend)
    assert all(t._version > b for t, b in zip(mine, before, strict=True))
    for found, right in zip(mine, wanted, strict=True):
        assert_same_bits(found, right)
    assert counts.dtype == torch.float32
    assert_same_bits(counts, sums[0].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_on_strided_state_and_rows(backend, dtype):
    x = torch.randn(7, 90).to(dtype).t()
    indices = torch.randint(33, (2, 90)).t()[:, 0]
    packed = state(dtype=dtype)[:3]
    apart = [torch.stack([t, t + 1], -1)[..., 0] for t in packed]
    wanted = fastvq.ema_step_(*packed, x.contiguous(), indices.contiguous(), decay=0.9, backend=backend)
    counts = torch.zeros(66, dtype=dtype)[::2]
    torch.ops.fastvq.ema_step_(*apart, counts, x, indices, None, 0.9, 1e-5, backend)
    for found, right in zip([*apart, counts], [*packed, wanted], strict=True):
        assert_same_bits(found, right)


def test_a_step_without_rows(backend):
    mine = state()[:3]
    wanted = [t.clone() for t in mine]
    fastvq.ema_update_(*wanted, torch.zeros(33), torch.zeros(33, 7), decay=0.9, backend=backend)
    counts = fastvq.ema_step_(*mine, torch.randn(0, 7), torch.zeros(0, dtype=torch.int64), decay=0.9, backend=backend)
    assert counts.eq(0).all()
    for found, right in zip(mine, wanted, strict=True):
        assert_same_bits(found, right)


def test_a_step_with_an_index_past_the_codebook_writes_nothing(backend):
    mine = state()[:3]
    before = [t.clone() for t in mine]
    with pytest.raises(ValueError, match=r"^indices must be below codebook_size = 33; got 33$"):
        fastvq.ema_step_(*mine, torch.randn(2, 7), torch.tensor([1, 33]), decay=0.9, backend=backend)
    for found, right in zip(mine, before, strict=True):
        assert_same_bits(found, right)


def test_a_step_on_any_number_of_threads(backend):
    x, indices = torch.randn(20_000, 7), torch.randint(33, (20_000,))
    results = []
    for number in (1, 2, 3):
        torch.manual_seed(3)
        mine = state()[:3]
        with threads(number):
            results.append([*mine, fastvq.ema_step_(*mine, x, indices, decay=0.9, backend=backend)])
    for other in results[1:]:
        for found, first in zip(other, results[0], strict=True):
            assert_same_bits(found, first)
