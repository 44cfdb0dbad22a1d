"""The comparators, and the search grid that several tests walk."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from families import DTYPES, FAMILIES, make

import fastvq

DIMS = (1, 2, 3, 7, 8, 16, 31, 64, 127, 252, 256, 1000, 1023)
SIZES = (1, 2, 7, 64, 1000, 8192)


def assert_same_indices(found, expected, what=""):
    """Every index equal, and int64 of the right shape; wherever they lie."""
    found = found.cpu()
    assert found.dtype == torch.int64, f"{what}: indices are {found.dtype}"
    assert found.shape == expected.shape, f"{what}: indices have shape {found.shape}, not {expected.shape}"
    wrong = (found != expected).nonzero()
    if len(wrong):
        row = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what}: {len(wrong)} of {expected.numel()} indices differ, first at {row}: "
            f"{found[row].item()} for {expected[row].item()}"
        )


def assert_same_bits(found, expected, what=""):
    """Every value equal, NaN to NaN and zero to zero of the same sign; dtype and shape too, wherever they lie."""
    found, expected = found.cpu(), expected.cpu()
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, not {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, not {expected.shape}"
    same = (found == expected) & (found.signbit() == expected.signbit()) | found.isnan() & expected.isnan()
    if not same.all():
        at = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} values differ, first at {at}: "
            f"{found[at].item()!r} for {expected[at].item()!r}"
        )


def assert_no_less_exact(found, plain, truth, slack=4.0, what=""):
    """`found` is as near to float64 `truth` as the plain torch formulation `plain` is, give or take a few roundings."""
    assert found.shape == truth.shape, f"{what}: shape {found.shape}, not {truth.shape}"
    found = found.cpu()
    step = torch.finfo(found.dtype).eps * truth.abs().max().clamp(min=torch.finfo(found.dtype).tiny)
    allowed = (plain.double() - truth).abs().max() + slack * step
    error = (found.double() - truth).abs().max()
    assert error <= allowed, f"{what}: error {error.item():.3e}, plain torch's and some roundings {allowed.item():.3e}"


@dataclass(frozen=True)
class Case:
    """One search: n rows of a family against k codes of d dimensions."""

    family: str
    dtype: str
    n: int
    k: int
    d: int
    seed: int
    metric: str = "euclidean"


def grid(family, dtype, budget, most, dims=DIMS, sizes=SIZES, metric="euclidean", seed=0):
    """The cases of one family and dtype; `budget` limits n * k * d of each, `most` its rows, but five at least."""
    for d in dims:
        for k in sizes:
            n = max(5, min(most, budget // (k * d)))
            yield Case(family, dtype, n, k, d, seed=1_000_003 * seed + 1009 * d + k, metric=metric)


def whole_grid(budget, most, **options):
    """All families and dtypes."""
    for family in FAMILIES:
        for dtype in DTYPES:
            yield from grid(family, dtype, budget, most, **options)


@contextmanager
def threads(number):
    """Run a block on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def expected(x, codebook, metric="euclidean"):
    """The reference's indices and distances; on one thread, for it goes in steps too small to share."""
    with threads(1):
        return fastvq.search(x, codebook, metric=metric, return_distance=True, backend="reference")


def check(case, backend):
    """The backend's indices and distances of one case are the reference's; on one thread, as most cases are small."""
    x, codebook = make(case.family, case.n, case.k, case.d, case.dtype, case.seed)
    wanted, distances = expected(x, codebook, case.metric)
    with threads(1):
        found = fastvq.search(x, codebook, metric=case.metric, return_distance=True, backend=backend)
        # Without distances a backend may take another way.
        bare = fastvq.search(x, codebook, metric=case.metric, backend=backend)
    assert_same_indices(found[0], wanted, f"{case}")
    assert_same_bits(found[1], distances, f"{case} distances")
    assert_same_indices(bare, wanted, f"{case} without distances")
