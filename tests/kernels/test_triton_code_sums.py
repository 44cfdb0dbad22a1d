"""Triton's code_sums in the interpreter: counts and sums of the reference bit for bit, all tensors between guards."""

import pytest
import torch
from compare import assert_same_bits
from families import DTYPES, FAMILIES, make
from fastvq.kernels import code_sums as kernels
from guard import DEVICE, GuardedAllocations, guarded, on_device

from fastvq.backends import reference, triton


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch):
    """Unrolled less, the interpreter is done sooner."""
    monkeypatch.setattr(kernels, "UNROLL", 3)


def by_chunks(rows, size):
    """Rows (n, D) added `size` at a time, then these sums in the same way, until one is left."""
    while len(rows) > size:
        rows = torch.stack([by_chunks(part, size) for part in rows.split(size)])
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for row in rows.double():
        total += row
    return total


def check(x, indices, size, mask=None, per_head=False, guard="end"):
    wanted = reference.code_sums(x, indices, size, mask, per_head)
    x, indices, mask = guarded(x, guard), guarded(indices, guard), None if mask is None else guarded(mask, guard)
    with GuardedAllocations(guard):
        found = triton.code_sums(x, indices, size, mask, per_head)
    for mine, right, name in zip(found, wanted, ("counts", "sums"), strict=True):
        assert_same_bits(mine, right, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["scaled_rows", "not_finite", "zeros"])
def test_families(family, dtype):
    assert family in FAMILIES
    check(make(family, 29, 1, 5, dtype)[0], torch.randint(-1, 4, (29,)), 4, guard="start")


@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 2), (1, 1, 1), (7, 300, 3), (9, 1, 33), (5, 2, 600)])
def test_shapes(n, k, d):
    check(torch.randn(n, d), torch.randint(k, (n,)), k)


def test_masks_and_heads():
    x, indices, mask = torch.randn(2, 3, 5, 4), torch.randint(-1, 3, (2, 3, 5)), torch.rand(2, 3, 5) < 0.6
    x[~mask] = torch.nan
    check(x, indices, 3, mask)
    check(x, indices, 3, mask, per_head=True)
    check(x, torch.full_like(indices, -1), 3)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 2, 3, 1),  # an image, channels second: rows lie side by side
        lambda x: x[:, ::2, 1:],  # two strides of the leading shape
        lambda x: x[::2, 1:, ::2],  # three
        lambda x: x[:1, :1, :1].expand(2, 3, 4, 6),
        torch._neg_view,
    ],
)
def test_strided_rows(view):
    x = view(torch.randn(3, 4, 5, 6))
    check(x, torch.randint(3, x.shape[:-1]), 3)


@pytest.mark.parametrize("n", [1, 4, 5, 16, 17, 65])
def test_many_rows_of_a_code_are_added_by_chunks_wherever_they_start(n, monkeypatch):
    """Chunks of four rows: up to four levels. The same rows give the same bits whatever comes before them."""
    monkeypatch.setattr(kernels, "CHUNK", 4)
    x = make("scaled_rows", n, 1, 3, "float64", seed=n)[0]
    for before in (0, 3):
        rows = torch.cat([torch.randn(before, 3).double(), x])
        indices = torch.cat([torch.arange(before) % 2, torch.full((n,), 2)])
        with GuardedAllocations():
            counts, sums = triton.code_sums(guarded(rows), guarded(indices), 4, None, False)
        assert counts.tolist() == [(before + 1) // 2, before // 2, n, 0]
        assert_same_bits(sums[2], by_chunks(x, 4), f"{n} rows after {before}")


def test_two_codes_that_share_windows(monkeypatch):
    """Every pair of lengths about the size of a chunk, so that chunks begin and end at every place of a window."""
    monkeypatch.setattr(kernels, "CHUNK", 4)
    x = make("scaled_rows", 21, 1, 1, "float64")[0]
    for first in range(0, 21, 2):
        indices = torch.full((21,), 1).index_fill(0, torch.randperm(21)[:first], 0)
        _, sums = triton.code_sums(*on_device(x, indices), 2, None, False)
        for code in (0, 1):
            assert_same_bits(sums[code], by_chunks(x[indices == code], 4), f"{first} rows, code {code}")


def test_a_chunk_is_long_enough_for_the_reference_to_agree():
    x = make("scaled_rows", 256, 1, 2, "float64")[0]
    assert kernels.CHUNK == 256
    check(x, torch.zeros(256, dtype=torch.int64), 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="the device assertion would end the process's work on the GPU")
def test_an_index_past_the_codebook_writes_nowhere():
    """On a device it also ends the kernel; the interpreter does not evaluate device assertions."""
    x, indices = torch.randn(6, 2), torch.tensor([0, 3, 2, 2**40, 1, 300])
    with GuardedAllocations():
        found = triton.code_sums(guarded(x), guarded(indices), 3, None, False)
    indices[indices > 2] = -1
    for mine, right in zip(found, reference.code_sums(x, indices, 3, None, False), strict=True):
        assert_same_bits(mine, right)


@pytest.mark.parametrize("k", [255, 256, 32767, 32768])
def test_keys_are_as_narrow_as_the_codebook_allows(k):
    indices = torch.tensor([[k - 1], [-1], [0], [k - 1]]).unsqueeze(0)
    by_code = kernels.rows_by_code(*on_device(indices), None, k, checked=True)
    assert by_code.codes.tolist() == [[0, k - 1, k - 1, k]]
    assert by_code.order.tolist() == [[2, 0, 3, 1]]
    assert by_code.starts[0, [0, 1, k - 1, k]].tolist() == [0, 1, 1, 3]
    assert by_code.codes.element_size() == {255: 1, 256: 2, 32767: 2, 32768: 4}[k]
