"""Triton's ema_update_ in the interpreter: the reference's state, in place, all tensors between guards."""

import pytest
import torch
from compare import assert_same_bits
from fastvq.kernels import ema_update as kernels
from guard import GuardedAllocations, guarded, on_device

from fastvq.backends import reference, triton

NAMES = ("codebook", "cluster_size", "embed_avg", "counts", "sums")


def state(k, d, dtype=torch.float32, heads=()):
    """The five tensors; the sizes are quarters, so that their total is exact in any order."""
    sizes = [(torch.randint(1, 40, (*heads, k)) / 4).to(dtype) for _ in range(2)]
    wide = [torch.randn(*heads, k, d).to(dtype) for _ in range(3)]
    return [wide[0], sizes[0], wide[1], sizes[1], wide[2]]


def check(tensors, decay=0.75, eps=1e-5, guard="end"):
    wanted = [t.clone() for t in tensors]
    reference.ema_update_(*wanted, decay, eps)
    mine = [guarded(t, guard) for t in tensors]
    versions = [t._version for t in mine]
    with GuardedAllocations(guard):
        triton.ema_update_(*mine, decay, eps)
    for found, right, name in zip(mine, wanted, NAMES, strict=True):
        assert_same_bits(found, right, name)
    assert [t._version > v for t, v in zip(mine, versions, strict=True)] == [True, True, True, False, False]


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, heads):
    check(state(33, 7, dtype, heads), guard="start")


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1500, 1), (5, 300)])
def test_shapes(k, d):
    check(state(k, d))


@pytest.mark.parametrize("alone", [0, 4096])
def test_the_total_of_more_blocks_than_a_tile(alone, monkeypatch):
    monkeypatch.setattr(kernels, "_ALONE", alone)
    monkeypatch.setattr(kernels, "_BLOCK", 4)
    check(state(70, 3))


def by_pairs(values):
    """The sums of values (..., n) over n, a power of two: of neighbours, of neighbouring pairs, and so on."""
    while values.shape[-1] > 1:
        values = values[..., ::2] + values[..., 1::2]
    return values


@pytest.mark.parametrize(("k", "heads"), [(1, ()), (1500, (2,)), (3000, ())])
def test_one_kernel_or_two_add_in_the_order_that_is_written_down(k, heads, monkeypatch):
    """Sizes of all magnitudes, so that any other order gives other bits; and no program may see what another wrote."""
    tensors = state(k, 3, torch.float64, heads)
    for i in (1, 3):
        tensors[i] = 10 ** (8 * torch.rand(*heads, k, dtype=torch.float64) - 4)
    size = 0.9 * tensors[1] + (1 - 0.9) * tensors[3]
    average = 0.9 * tensors[2] + (1 - 0.9) * tensors[4]
    blocks = torch.nn.functional.pad(size, (0, -k % kernels._BLOCK)).unflatten(-1, (-1, kernels._BLOCK))
    totals = by_pairs(blocks).squeeze(-1)
    total = by_pairs(torch.nn.functional.pad(totals, (0, kernels._BLOCK - totals.shape[-1])))
    smoothed = (size + 1e-5) / (total + k * 1e-5) * total
    for alone in (0, kernels._ALONE):
        monkeypatch.setattr(kernels, "_ALONE", alone)
        mine = [guarded(t) for t in tensors]
        with GuardedAllocations():
            triton.ema_update_(*mine, 0.9, 1e-5)
        for found, right in zip(mine, (average / smoothed.unsqueeze(-1), size, average), strict=False):
            assert_same_bits(found, right, f"one kernel up to {alone}")


@pytest.mark.parametrize(("decay", "eps"), [(0.0, 0.0), (1.0, 0.1), (0.5, 5e-324)])
def test_numbers_arrive_in_float64(decay, eps):
    check(state(9, 4, torch.float64), decay, eps)


def test_a_decay_that_float32_cannot_hold():
    tensors = on_device(*state(9, 4, torch.float64))
    size, count = tensors[1].clone(), tensors[3]
    triton.ema_update_(*tensors, 0.99, 1e-5)
    assert_same_bits(tensors[1], 0.99 * size + (1 - 0.99) * count)


def test_state_is_updated_where_it_lies():
    tensors = state(20, 6)
    tensors[0] = tensors[0].t().contiguous().t()
    tensors[1] = torch.zeros(20, 3)[:, 1].copy_(tensors[1])
    tensors[2] = torch.zeros(40, 12)[::2, ::2].copy_(tensors[2])
    tensors[3] = torch._neg_view(-tensors[3])
    tensors[4] = tensors[4][:1].expand(20, 6)
    check(tensors)


def test_codes_without_rows_stay_finite_and_a_dead_codebook_is_the_references():
    tensors = state(6, 2)
    tensors[1].zero_()
    tensors[3].zero_()
    check([t.clone() for t in tensors])
    tensors[3][2] = 2
    check(tensors)
    tensors = on_device(*tensors)
    triton.ema_update_(*tensors, 0.99, 1e-5)
    assert tensors[0].isfinite().all()
    assert (tensors[1] < 0.01).tolist() == [True, True, False, True, True, True], "what a caller marks dead codes by"


@pytest.mark.parametrize(("dtype", "bit"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_narrow_results_are_rounded_as_torch_rounds_them(dtype, bit):
    """By way of float32, where the last bit is lost and a tie goes to even; at once it would go up."""
    tensors = state(4, 1)
    tensors[1] = tensors[1].to(dtype)
    tensors[3] = torch.full((4,), 1 + 2.0**-bit + 2.0**-30, dtype=torch.float64)
    check(tensors, decay=0.0)
