"""The CUDA kernels of code_sums, on the CPU: the sums of the reference bit for bit, all tensors between guards."""

import pytest
import torch
from compare import assert_same_bits
from families import DTYPES, make
from guard import GuardedAllocations, guarded
from shimmed import dies

from fastvq.backends import cuda, reference

pytestmark = pytest.mark.usefixtures("kernels", "way")


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
        found = cuda.code_sums(x, indices, size, mask, per_head)
    for mine, right, name in zip(found, wanted, ("counts", "sums"), strict=True):
        assert_same_bits(mine, right, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["scaled_rows", "not_finite", "zeros"])
def test_families(family, dtype):
    check(make(family, 29, 1, 5, dtype)[0], torch.randint(-1, 4, (29,)), 4, guard="start")
    check(make(family, 29, 1, 16, dtype)[0], torch.randint(-1, 4, (29,)), 4, guard="start")


@pytest.mark.parametrize(("n", "k", "d"), [(0, 3, 2), (1, 1, 1), (7, 300, 3), (9, 1, 33), (5, 2, 600), (9, 3, 1200)])
def test_shapes(n, k, d):
    check(torch.randn(n, d), torch.randint(k, (n,)), k)


def test_many_rows(seed):
    check(torch.randn(3, 500, 64), torch.randint(100, (3, 500)), 100, torch.rand(3, 500) < 0.9, per_head=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_blocks(dtype):
    """Integers, so that any order gives the same sums."""
    x = torch.randint(-9, 9, (2, 8200, 3)).to(dtype)
    check(x, torch.randint(-1, 50, (2, 8200)), 50, torch.rand(2, 8200) < 0.9, per_head=True)


def test_which_sums_fit_shared_memory(shim_module, way):
    if way == "in shared memory":
        parts = shim_module.small_sums_parts
        assert [parts(n, 1024, 8, 4) for n in (0, 1, 8192, 8193, 10**6)] == [1, 1, 1, 2, 123]
        assert [bool(parts(1, k, d, 4)) for k, d in ((1024, 9), (1024, 16), (256, 32), (1, 8000), (1 << 20, 1))] == [
            *[True, False, True, False, False]
        ]


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
        lambda x: x[:1, :1, :1].expand(2, 3, 4, 8),
        torch._neg_view,
    ],
)
def test_strided_rows(view):
    x = view(torch.randn(3, 4, 5, 8))
    check(x, torch.randint(3, x.shape[:-1]), 3)


@pytest.mark.parametrize("n", [1, 4, 5, 16, 17, 65])
def test_many_rows_of_a_code_are_added_by_chunks_wherever_they_start(n, by_sorting, monkeypatch):
    """Chunks of four rows: up to four levels. The same rows give the same bits whatever comes before them."""
    monkeypatch.setattr(cuda, "CHUNK", 4)
    x = make("scaled_rows", n, 1, 3, "float64", seed=n)[0]
    for before in (0, 3):
        rows = torch.cat([torch.randn(before, 3).double(), x])
        indices = torch.cat([torch.arange(before) % 2, torch.full((n,), 2)])
        with GuardedAllocations():
            counts, sums = cuda.code_sums(guarded(rows), guarded(indices), 4, None, False)
        assert counts.tolist() == [(before + 1) // 2, before // 2, n, 0]
        assert_same_bits(sums[2], by_chunks(x, 4), f"{n} rows after {before}")


def test_two_codes_that_share_windows(by_sorting, monkeypatch):
    """Every pair of lengths about the size of a chunk, so that chunks begin and end at every place of a window."""
    monkeypatch.setattr(cuda, "CHUNK", 4)
    x = make("scaled_rows", 21, 1, 1, "float64")[0]
    for first in range(21):
        indices = torch.full((21,), 1).index_fill(0, torch.randperm(21)[:first], 0)
        _, sums = cuda.code_sums(x, indices, 2, None, False)
        for code in (0, 1):
            assert_same_bits(sums[code], by_chunks(x[indices == code], 4), f"{first} rows, code {code}")


def test_a_chunk_is_long_enough_for_the_reference_to_agree():
    x = make("scaled_rows", 256, 1, 2, "float64")[0]
    assert cuda.CHUNK == 256
    check(x, torch.zeros(256, dtype=torch.int64), 1)


def test_an_index_past_the_codebook_ends_the_kernel(kernels):
    assert "__trap" in dies(
        kernels,
        "import torch; cuda.code_sums(torch.randn(6, 2), torch.tensor([0, 3, 2, 2**40, 1, 300]), 3, None, False)",
    )
