"""Triton's search in the interpreter: the canonical index for every row, every tensor between forbidden pages."""

import itertools

import numpy as np
import pytest
import torch
from compare import assert_same_bits, assert_same_indices
from families import DTYPES, FAMILIES, make
from fastvq.kernels import codes, launch
from fastvq.kernels import search as kernels
from fastvq.kernels.codes import pack_codes
from fastvq.kernels.launch import DEVICES, device_of
from fastvq.kernels.rows import rows_of
from guard import DEVICE, GuardedAllocations, guarded, on_device

from fastvq.backends import reference, triton

METRICS = ("euclidean", "dot", "cosine")


def check(x, codebook, metric="euclidean", what="", guard="end"):
    """Indices and distances equal the reference's, with every tensor next to a forbidden page."""
    wanted, right = reference.search(x, codebook, metric, True, "exact")
    x, codebook = guarded(x, guard), guarded(codebook, guard)
    with GuardedAllocations(guard):
        found, distances = triton.search(x, codebook, metric, True, "exact")
    assert_same_indices(found, wanted, what)
    assert_same_bits(distances, right, what)


def listed(x, codebook, metric="euclidean"):
    """What the screen leaves: (splits, LISTED, N) groups of one head."""
    x, codebook = on_device(x, codebook)
    rows = rows_of(x, False)
    width = kernels.width_of(rows.dim)
    tiles = kernels.tiles_for(device_of(x), len(codebook), width, kernels.operand_type(x, codebook)[1])
    return kernels.screen(device_of(x), rows, codebook, metric == "euclidean", width, tiles, 1.0)[0][0].cpu()


def whole_rows(groups):
    """Which rows the screen could not narrow down."""
    return (groups[:, 0] == kernels.WHOLE.value).any(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, dtype):
    check(*make(family, 35, 203, 7, dtype), guard="start")
    if dtype in ("float32", "bfloat16"):
        check(*make(family, 9, 129, 40, dtype, seed=1), "dot")


@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        *[(d, "float32") for d in (1, 2, 3, 16, 17, 31, 127, 252, 256, 300)],
        *[(d, "bfloat16") for d in (1, 33, 200, 300)],
        *[(d, "float64") for d in (5, 64, 257)],
        *[(1023, dtype) for dtype in ("float32", "float16")],
        (1100, "bfloat16"),
    ],
)
def test_dimensions(d, dtype):
    check(*make("gaussian", 9 if d > 256 else 33, 65, d, dtype, d), METRICS[d % 3])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 64, 65, 127, 128, 1000, 4099])
def test_codebook_sizes(k):
    check(*make("gaussian", 33, k, 8, seed=k))


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 100])
def test_row_counts(n):
    check(*make("gaussian", n, 100, 12, seed=n))
    check(*make("power_law", n, 700, 12, seed=n))  # split over the codes


def test_large_codebook_in_many_segments(monkeypatch):
    monkeypatch.setattr(codes, "_BLOCK", 64)  # still several for a program that packs
    x, codebook = make("gaussian", 9, 20_001, 16)
    x[5] = codebook[20_000]
    check(x, codebook)


def test_a_million_codes(monkeypatch):
    """2^20 codes, in tiles that the interpreter gets through; some stand in the codebook twice, far apart."""
    monkeypatch.setattr(codes, "_BLOCK", 4096)
    monkeypatch.setattr(kernels, "tiles_for", lambda *rest: kernels.Tiles(16, 2048, 2, 4, 1))
    x, codebook = make("gaussian", 6, 1 << 20, 8)
    codebook[-1] = codebook[77]
    codebook[-2] = codebook[(1 << 19) + 1]
    for row, code in enumerate((-1, -2, -3, 0, 1 << 19)):
        x[row] = codebook[code] * 1.001
    check(x, codebook)


@pytest.mark.parametrize("metric", METRICS[:2])  # cosine differs from dot in nothing
def test_lengths_whose_squares_underflow(metric):
    """A norm that underflows to zero must not make the bound zero: rows or codes of 1e-25 beside others of 100."""
    for small in (1e-20, 1e-25):
        x, codebook = make("gaussian", 48, 128, 24, "bfloat16")
        codebook[1::2] = codebook[::2] * (1 + 0.01 * torch.randn(64, 1)).to(codebook.dtype)
        check(x * small, codebook * 100, metric)
        check(x * 100, codebook * small, metric)
        short, longest = codebook * small, (codebook * small).double().norm(dim=1).max()
        packed = pack_codes(*on_device(short[None]), torch.bfloat16, True, metric == "euclidean", 32, 32, 2)
        assert packed.bounds[..., 0].max() >= longest


def test_layouts():
    image, codebook = make("gaussian", 2 * 3 * 4, 50, 12)
    image = image.reshape(2, 3, 4, 12)
    for x in (
        image,
        image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),  # channels first in memory
        image.transpose(0, 2),
        image[:, ::2, 1:],
        image[0, 0, 0].expand(3, 4, 12),
        image[0, 0, 0],
        torch.cat([image, image], -1)[..., ::2],
        image.flip(1),
    ):
        check(x, codebook)
    check(x, codebook.t().contiguous().t())
    check(x, torch.cat([codebook, codebook])[::2])


def test_heads():
    x, codebook = make("near_tied", 40, 70, 9, heads=3)
    check(x, codebook)
    check(x.reshape(3, 5, 8, 9).transpose(1, 2), codebook, "dot")
    check(x.transpose(0, 1).contiguous().transpose(0, 1), codebook)


# ---- each way through the kernels, forced by data -----------------------------------------------------------------


def test_most_rows_are_settled_by_one_group():
    for family in ("gaussian", "offset", "power_law", "fresh", "normalised"):
        x, codebook = make(family, 128, 1024, 64)
        groups = listed(x, codebook)
        assert whole_rows(groups).float().mean() < 0.02
        assert (groups[0, 1] >= 0).float().mean() < 0.2


def test_rows_with_several_groups():
    """Codes that are equal but for 1e-7 lie in groups far apart: more than one is listed, the contract decides."""
    x, codebook = make("gaussian", 64, 512, 24)
    codebook[256:] = codebook[:256].roll(5, 0) * (1 + 1e-7 * torch.randn(256, 24))
    groups = listed(x, codebook)
    several = ((groups >= 0).sum((0, 1)) > 1) & ~whole_rows(groups)
    assert several.float().mean() > 0.5
    check(x, codebook)


def test_rows_with_too_many_groups_are_queued():
    x, codebook = make("gaussian", 64, 512, 24)
    codebook[::4] = codebook[0]
    x[::2] = codebook[0] + 1e-4 * torch.randn(32, 24)
    assert torch.equal(whole_rows(listed(x, codebook)), torch.arange(64) % 2 == 0)
    check(x, codebook)


@pytest.mark.parametrize("metric", METRICS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_is_queued(dtype, metric):
    """Three codes, a unit in the last place apart, each some thirty times in the codebook; a NaN row, a NaN code."""
    x, codebook = make("gaussian", 9, 301, 19, dtype, heads=2)
    kind = torch.from_numpy(np.random.default_rng(0).integers(3, size=(2, 100, 1)))
    codebook[:, 1::3] = codebook[:, :1] * 4 * (1 + kind * torch.finfo(codebook.dtype).eps).to(codebook.dtype)
    x += codebook[:, 1:2]
    if metric == "euclidean":
        codebook[0, 5] = torch.nan
        x[0, 8, 3] = torch.nan
    assert whole_rows(listed(x[0], codebook[0], metric)).all()
    check(x.transpose(1, 2).contiguous().transpose(1, 2), codebook, metric)
    for n in (1, 3):  # so few that programs share the codes of a row
        check(x[:, -n:], codebook, metric)


def test_a_second_code_hidden_in_the_same_column_is_seen():
    """Two codes of one column of the tile, in different segments: only the runner-up tells of the second."""
    tiles = kernels.tiles_for(device_of(*on_device(torch.empty(0))), 1024, 16)
    segment = tiles.columns * tiles.steps
    x, codebook = make("gaussian", 8, 8 * segment, 16)
    codebook[:] += 10 * torch.randn(16)
    codebook[segment + 3] = x[0]
    codebook[5 * segment + 3] = x[0]
    wanted, _ = reference.search(x, codebook, "euclidean", False, "exact")
    assert wanted[0] == segment + 3
    check(x, codebook)


def test_all_codes_equal_and_everything_infinite():
    x, codebook = make("all_equal", 20, 300, 16)
    assert whole_rows(listed(x, codebook)).all()
    check(x, codebook)
    check(torch.full((5, 6), torch.inf), torch.randn(9, 6))
    check(torch.full((5, 6), torch.nan), torch.randn(9, 6))
    check(torch.randn(5, 6), torch.full((9, 6), torch.nan))
    check(1e200 * torch.randn(5, 6, dtype=torch.float64), 1e200 * torch.randn(9, 6, dtype=torch.float64))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU takes its own way")
@pytest.mark.parametrize(
    ("arch", "dtype", "k", "d"),
    [
        *[("sm_90", "bfloat16", 4099, 20), ("sm_90", "float16", 4099, 40), ("sm_80", "float64", 203, 40)],
        *[("sm_100", "float32", 203, 40), ("sm_120", "float32", 203, 20), ("sm_120", "mixed", 203, 40)],
        *[("sm_120", "float64", 203, d) for d in (5, 100)],
    ],
)
def test_rows_that_a_device_rounds_first(arch, dtype, k, d, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(arch=arch))
    x, codebook = make("gaussian", 21, k, d, dtype)
    raw = kernels.operand_type(x, codebook)[1]
    assert kernels.rounded_before(launch.INTERPRETER, k, kernels.width_of(d), x.dtype, raw)
    check(x, codebook)


# ---- configurations -----------------------------------------------------------------------------------------------


def test_every_choice_fits_the_device():
    for device in DEVICES.values():
        for n in (1, 100, 10_000, 10**7):
            for k in (1, 64, 1024, 65_536, 1 << 20):
                for d, raw in itertools.product((1, 8, 32, 64, 128, 256, 512, 1023), (False, True)):
                    width = kernels.width_of(d)
                    tiles = kernels.tiles_for(device, k, width, raw)
                    assert kernels.shared_memory(device, tiles, width) <= device.shared_memory, (
                        device.arch,
                        n,
                        k,
                        d,
                        tiles,
                    )
                    blocks = -(-n // tiles.rows)
                    segments = -(-k // (tiles.columns * tiles.steps))
                    splits = kernels.splits_for(device, blocks, segments)
                    assert 1 <= splits <= max(1, segments)
                    assert splits * blocks <= max(blocks, device.multiprocessors)
