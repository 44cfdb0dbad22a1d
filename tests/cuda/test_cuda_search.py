"""The CUDA search on the CPU: the canonical index for every row, every tensor between forbidden pages."""

import pytest
import torch
from compare import assert_same_bits, assert_same_indices
from families import DTYPES, FAMILIES, make
from guard import GuardedAllocations, guarded

from fastvq.backends import cuda, reference

pytestmark = pytest.mark.usefixtures("kernels")

METRICS = ("euclidean", "dot")
# Architecture, multiprocessors, shared memory: with one multiprocessor few rows are enough for whole blocks.
H100 = (90, 132, 232_448)
LONELY = (90, 1, 232_448)
DEVICES = [(80, 108, 166_912), (86, 84, 101_376), (89, 128, 101_376), H100, (100, 148, 232_448), (120, 188, 101_376)]


def check(x, codebook, metric="euclidean", what="", guard="end"):
    """Indices and distances equal the reference's, with every tensor next to a forbidden page."""
    wanted, right = reference.search(x, codebook, metric, True, "exact")
    x, codebook = guarded(x, guard), guarded(codebook, guard)
    with GuardedAllocations(guard):
        found, distances = cuda.search(x, codebook, metric, True, "exact")
        bare, _ = cuda.search(x, codebook, metric, False, "exact")
    assert_same_indices(found, wanted, what)
    assert_same_bits(distances, right, what)
    assert_same_indices(bare, wanted, what)


@pytest.fixture(params=[H100, LONELY], ids=["many", "one"])
def device(request, monkeypatch):
    """Many multiprocessors, so that the codes are split, or one, so that they are not and may stay in shared memory."""
    monkeypatch.setattr(cuda, "_device", lambda _: request.param)
    return request.param


def plan_of(x, codebook, device=H100):
    """How a search of one head is cut."""
    return cuda.plan_search(device, x.dtype, cuda._codes(codebook, x).dtype, 1, len(x), *codebook.shape)


def queued(x, codebook, monkeypatch, metric="euclidean"):
    """How many rows of one head the screen leaves to be scored whole; through all stages, if there are several."""
    kept = []
    empty = cuda._empty

    def keep(shape, dtype, like):
        tensor = empty(shape, dtype, like)
        if dtype == torch.uint8:
            kept.append(tensor)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_empty", keep)
        if codebook.dim() == 2:
            cuda.search(x, codebook, metric, False, "exact")
        else:
            cuda.residual_search(x, codebook, metric)
    return kept[0][12:16].view(torch.int32).item()  # CodebookFigures::queued


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, dtype, device):
    check(*make(family, 35, 203, 7, dtype), guard="start")
    check(*make(family, 9, 129, 40, dtype, seed=1), "dot" if device == LONELY else "euclidean")


@pytest.mark.parametrize("d", [8, 40, 300])
def test_orders_of_warps(d, device, seed):
    check(*make("near_tied", 70, 300, d, seed=seed), METRICS[seed % 2])


@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        *[(d, "float32") for d in (1, 2, 3, 4, 5, 8, 9, 10, 16, 17, 31, 64, 127, 252, 256, 300)],
        *[(d, "bfloat16") for d in (1, 33, 200, 300)],
        *[(d, "float64") for d in (5, 64, 257)],
        *[(1023, dtype) for dtype in ("float32", "float16")],
    ],
)
def test_dimensions(d, dtype, device):
    check(*make("gaussian", 9 if d > 256 else 33, 65, d, dtype, d), METRICS[d % 2])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 64, 65, 127, 128, 1000, 4099])
def test_codebook_sizes(k, device):
    check(*make("gaussian", 33, k, 8, seed=k))
    check(*make("gaussian", 5, k, 24, seed=k))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 300, 600])
def test_row_counts(n, device):
    check(*make("gaussian", n, 100, 12, seed=n))
    check(*make("power_law", n, 260, 20, "bfloat16", seed=n), "dot")


def test_large_codebook_in_many_splits():
    x, codebook = make("gaussian", 3, 20_001, 16)
    x[2] = codebook[20_000]
    assert plan_of(x, codebook)["splits"] > 8
    check(x, codebook)


def test_layouts(device):
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
        torch._neg_view(image),
    ):
        check(x, codebook)
        check(torch.cat([x, x], -1), torch.cat([codebook, codebook], -1))
    check(x, codebook.t().contiguous().t())
    check(x, torch.cat([codebook, codebook])[::2])


def test_rows_off_every_boundary(device):
    for dtype in ("float32", "float16"):
        x, codebook = make("gaussian", 20, 70, 32, dtype)
        flat, codes = (torch.cat([t.new_zeros(1), t.reshape(-1)]) for t in (x, codebook))
        check(flat[1:].view(20, 32), codes[1:].view(70, 32))


def test_heads(device):
    x, codebook = make("near_tied", 40, 70, 9, heads=3)
    check(x, codebook)
    check(x.reshape(3, 5, 8, 9).transpose(1, 2), codebook, "dot")
    check(x.transpose(0, 1).contiguous().transpose(0, 1), codebook)
    check(*make("gaussian", 20, 33, 300, "float16", heads=2))
    check(*make("gaussian", 20, 33, 12, "float64", heads=2))


# ---- each way through the kernels, forced by data -----------------------------------------------------------------


def test_hardly_a_row_is_scored_whole(monkeypatch):
    for family in ("gaussian", "offset", "power_law", "fresh", "normalised"):
        for dtype, d in (("float32", 64), ("bfloat16", 64), ("float32", 8)):
            x, codebook = make(family, 200, 1024, d, dtype)
            if dtype == "bfloat16":
                codebook = codebook.unique(dim=0)  # equal codes are ties in earnest
            assert queued(x, codebook, monkeypatch) <= 2, (family, dtype, d)


@pytest.mark.parametrize("d", [8, 24, 300])
def test_rows_with_several_groups(d, device, monkeypatch):
    """Codes that are equal but for 1e-7 lie in groups far apart: more than one survives, the contract decides."""
    x, codebook = make("gaussian", 64, 512, d)
    codebook[256:] = codebook[:256].roll(5, 0) * (1 + 1e-7 * torch.randn(256, d))
    check(x, codebook)
    assert queued(x, codebook, monkeypatch) < 4


@pytest.mark.parametrize("d", [8, 24, 300])
def test_rows_with_too_many_groups_are_queued(d, device, monkeypatch):
    x, codebook = make("gaussian", 64, 512, d)
    codebook[::4] = codebook[0]
    x[::2] = codebook[0] + 1e-4 * torch.randn(32, d)
    check(x, codebook)
    if device == LONELY:  # a small share of the codes has few groups a lane
        assert queued(x, codebook, monkeypatch) == 32


def test_three_codes_of_one_lane_are_seen(device):
    """Only the third smallest group of a lane tells of a fourth."""
    x, codebook = make("gaussian", 8, 1024, 24)
    codebook += 10 * torch.randn(24)
    for k in (70, 134, 326, 518):  # lane 0 of the quad, four segments
        codebook[k] = x[0]
    for metric in METRICS:
        check(x, codebook, metric)


def test_all_codes_equal_and_everything_infinite(device, monkeypatch):
    x, codebook = make("all_equal", 20, 600, 20)
    check(x, codebook)
    if device == LONELY:
        assert queued(x, codebook, monkeypatch) == 20
    for d in (6, 20):
        check(torch.full((5, d), torch.inf), torch.randn(9, d))
        check(torch.full((5, d), torch.nan), torch.randn(9, d))
        check(torch.randn(5, d), torch.full((9, d), torch.nan))
        check(1e200 * torch.randn(5, d, dtype=torch.float64), 1e200 * torch.randn(9, d, dtype=torch.float64))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [4, 24])
def test_lengths_whose_squares_underflow(d, dtype, metric, device):
    """A norm that underflows to zero must not make the bound zero: rows or codes of 1e-25 beside others of 100."""
    for small in (1e-20, 1e-25, 1e-30):
        x, codebook = make("gaussian", 64, 200, d, dtype)
        codebook[1::2] = codebook[::2] * (1 + 0.01 * torch.randn(100, 1)).to(codebook.dtype)
        check(x * small, codebook * 100, metric)
        check(x * 100, codebook * small, metric)


# ---- residual quantisation: all stages in one kernel --------------------------------------------------------------


def check_stages(x, codebooks, metric="euclidean", guard="end"):
    """The code of every stage is the reference's."""
    wanted = reference.residual_quantize(x, codebooks, metric)[1]
    x, codebooks = guarded(x, guard), guarded(codebooks, guard)
    with GuardedAllocations(guard):
        found = cuda.residual_search(x, codebooks, metric)
    assert_same_indices(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("family", ["gaussian", "near_tied", "integers", "not_finite", "all_equal", "scaled_rows"])
def test_stages_of_families(family, dtype, seed):
    x, codes = make(family, 40, 3 * 70, 20, dtype, seed)
    check_stages(x, codes.view(3, 70, 20), METRICS[seed % 2], guard="start")


@pytest.mark.parametrize(("n", "q", "k", "d"), [(0, 2, 3, 4), (1, 1, 1, 1), (300, 2, 65, 7), (140, 4, 130, 65)])
def test_stages_of_shapes(n, q, k, d):
    check_stages(torch.randn(n, d), torch.randn(q, k, d))
    check_stages(torch.randn(2, n, d), torch.randn(2, q, k, d))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["near_tied", "duplicated", "power_law", "tiny", "not_finite", "scaled_rows"])
def test_wide_stages_of_families(family, dtype):
    """Widths of 256 and 512, two sums a score; float64 by the contract, dimension by dimension."""
    for d, metric in ((252, "euclidean"), (131, "dot")) if dtype != "float64" else ((67, "euclidean"),):
        x, codes = make(family, 35, 2 * 65, d, dtype, d)
        check_stages(x, codes.view(2, 65, d), metric, guard="start")
    if family == "near_tied":
        x, codes = make(family, 20, 2 * 65, 300, dtype)
        check_stages(x, codes.view(2, 65, 300))


@pytest.mark.parametrize(
    ("n", "q", "k", "d", "dtype"),
    [
        *[
            (0, 2, 3, 200, "float32"),
            (1, 2, 1, 129, "float32"),
            (70, 2, 33, 255, "bfloat16"),
            (65, 2, 31, 511, "float32"),
        ],
        *[
            (0, 2, 3, 4, "float64"),
            (1, 3, 300, 1, "float64"),
            (19, 3, 40, 1023, "float64"),
            (9, 3, 17, 1700, "float64"),
        ],
    ],
)
def test_wide_stages_of_shapes(n, q, k, d, dtype):
    """Of 1700 float64 dimensions eight rows do not fit shared memory beside each other."""
    x, codes = make("gaussian", n, q * k, d, dtype, seed=n)
    check_stages(x, codes.view(q, k, d))
    check_stages(torch.stack([x, x.flip(0)]), torch.stack([codes.view(q, k, d), codes.flip(0).view(q, k, d)]), "dot")


def test_wide_stages_of_any_order_of_warps(seed):
    x, codes = make("near_tied", 70, 3 * 96, 140, seed=seed)
    check_stages(x, codes.view(3, 96, 140), METRICS[seed % 2])
    check_stages(x[:9, :70].double(), codes[:, :70].reshape(3, 96, 70).double())


def test_stages_of_mimi(monkeypatch):
    """D = 256, K = 2048, codebooks that shrink from stage to stage; no row needs every code."""
    x, codes = make("gaussian", 12, 8 * 2048, 256)
    codebooks = codes.view(8, 2048, 256) * 0.7 ** torch.arange(8.0)[:, None, None]
    check_stages(x.view(2, 6, 256).transpose(0, 1), codebooks)
    assert queued(x, codebooks, monkeypatch) == 0


@pytest.mark.parametrize(
    ("k", "d", "waiting"), [*[(256, d, range(1)) for d in (131, 260)], (256, 24, range(3, 7)), (640, 131, range(3, 7))]
)
def test_rows_with_more_candidates_than_are_kept(k, d, waiting, monkeypatch):
    """At the second stage 64 or 600 codes are nearest: the row is queued, or its warp looks at all codes."""
    x, codes = make("gaussian", 6, 2 * k, d)
    codebooks = codes.view(2, k, d) * torch.tensor([10.0, 1.0])[:, None, None]
    x[::2] = codebooks[0, 50:53] + codebooks[1, 0] + 1e-4 * torch.randn(3, d)
    alike = torch.arange(k) % 4 == 0 if k == 256 else torch.arange(k) % 16 != 1
    codebooks[1, alike] = codebooks[1, 0].clone()
    check_stages(x, codebooks)
    assert queued(x, codebooks, monkeypatch) in waiting


def test_a_row_looked_at_whole_has_its_canonical_code():
    """Codes that differ by less than the screen sees, and by less than float32 does."""
    x, codes = make("gaussian", 20, 2 * 300, 136)
    codebooks = codes.view(2, 300, 136)
    for scale, part in ((1e-5, slice(0, 150)), (1e-7, slice(150, 300))):
        codebooks[:, part] = codebooks[:, part][:, :1] + scale * torch.randn(2, 150, 136)
    codebooks[0, 7] = torch.inf
    for metric in METRICS:
        check_stages(x, codebooks, metric)


def test_the_policies_of_stages_by_architecture_and_shape(kernels):
    """(width, rows, tile, group) of a block: up to D = 256 on every device, up to 512 where shared memory is large."""
    roomy = {80, 90, 100}
    for device in DEVICES:
        for d, policy in (
            *[(d, (32, 128, 64, 16)) for d in (1, 32)],
            *[(d, (64, 128, 64, 16)) for d in (33, 64)],
            *[(d, (128, 128, 64, 16)) for d in (65, 128)],
            *[(d, (256, 64, 32, 8)) for d in (129, 256)],
            *[(d, (512, 64, 16, 4)) for d in (257, 512)],
        ):
            for k in (1, 1024, 1 << 20):
                plan = kernels.plan_stages(device, 0, 0, 1, 8, 10**6, k, d)
                if policy[0] == 512 and device[0] not in roomy:
                    assert plan["source"] == "chunked"
                    continue
                what = (device, k, d, plan)
                assert plan["source"] == "staged", what
                assert tuple(plan[name] for name in ("width", "rows", "tile", "group")) == policy, what
                residual_and_pipeline = plan["rows"] * (12 + 4 * plan["width"]) + 2 * plan["tile"] * (
                    2 * plan["width"] + 4
                )
                assert plan["shared_memory"] == residual_and_pipeline <= device[2], what
                assert plan["tiles"] * plan["tile"] >= k > (plan["tiles"] - 1) * plan["tile"], what
                assert plan["tiles"] * plan["tile"] // (4 * plan["group"]) <= 1 << plan["bits"], what
        assert kernels.plan_stages(device, 1, 0, 1, 8, 10**6, 1024, 513)["source"] == "chunked"


def test_stages_in_float64_are_one_kernel_too(kernels):
    """Eight rows in shared memory as long as they fit; else their residuals take 8 bytes a value of global memory."""
    for device in DEVICES:
        for x, codes in ((3, 3), (0, 3), (1, 3)):
            for d in (8, 513, 1572, 1700, 4096):
                plan = kernels.plan_stages(device, x, codes, 2, 8, 1000, 1024, d)
                assert plan["source"] == "none"
                fits = 8 * (8 * d + 96) <= device[2]
                assert (plan["scratch_bytes"] < 16_000 * d) == fits, (device, d)


# ---- how a search is cut ------------------------------------------------------------------------------------------


def test_every_plan_fits_its_device(kernels):
    seen = set()
    for device in DEVICES:
        for n in (1, 100, 10_000, 10**7, 2**33):
            for k in (1, 64, 1024, 65_536, 1 << 20):
                for d in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1023, 4096):
                    for x, codes in ((torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)):
                        plan = cuda.plan_search(device, x, codes, 1, n, k, d)
                        what = (device, n, k, d, x, plan)
                        assert plan["shared_memory"] <= device[2], what
                        assert plan["width"] >= (3 * d + 3 if plan["operand"] == "split" else d), what
                        assert plan["tiles"] * plan["tile"] >= k > (plan["tiles"] - 1) * plan["tile"], what
                        assert (plan["splits"] - 1) * plan["share"] < plan["tiles"] <= plan["splits"] * plan["share"]
                        segments = plan["share"] * plan["tile"] // (4 * plan["group"])
                        assert segments <= 1 << plan["bits"], what
                        assert plan["bits"] <= 15, what
                        blocks = -(-n // plan["rows"])
                        assert plan["splits"] * blocks <= max(blocks, device[1]), what
                        seen.add((plan["operand"], plan["source"], plan["width"] if d <= 256 else 0))
    assert seen == {
        *[("split", source, width) for source in ("resident", "streamed") for width in (16, 32, 64)],
        *[(operand, "resident", width) for operand in ("rounded", "stored") for width in (32, 64)],
        *[(operand, "streamed", width) for operand in ("rounded", "stored") for width in (32, 64, 128, 256)],
        *[(operand, "chunked", 0) for operand in ("rounded", "stored")],
    }


def test_the_policies_by_architecture_and_shape(kernels):
    """Many rows: small codebooks stay in the shared memory that a device has, blocks of 256 rows stream the others."""
    roomy = {80: True, 86: False, 89: False, 90: True, 100: True, 120: False}
    for device in DEVICES:
        of_64 = ("resident", 512, 128) if roomy[device[0]] else ("streamed", 256, 128)
        for x, k, d, operand, width, cut in (
            (torch.float32, 1024, 2, "split", 16, ("resident", 512, 256)),
            (torch.float32, 1024, 8, "split", 32, ("resident", 512, 128)),
            (torch.float32, 1 << 16, 16, "split", 64, ("streamed", 256, 64)),
            (torch.bfloat16, 1024, 64, "stored", 64, of_64),
            (torch.float16, 1 << 16, 8, "stored", 32, ("streamed", 256, 128)),
            (torch.bfloat16, 1 << 16, 64, "stored", 64, ("streamed", 256, 128)),
            (torch.float32, 1 << 16, 128, "rounded", 128, ("streamed", 256, 64)),
            (torch.float32, 1024, 256, "rounded", 256, ("streamed", 256, 64)),
            (torch.float32, 1 << 16, 512, "rounded", 512, ("chunked", 256, 64)),
        ):
            plan = cuda.plan_search(device, x, x, 1, 10**6, k, d)
            found = plan["operand"], plan["width"], (plan["source"], plan["rows"], plan["tile"])
            assert found == (operand, width, cut), (device, x, k, d)
            assert plan["splits"] == 1
            few = cuda.plan_search(device, x, x, 1, 1, 1 << 20, d)
            assert few["splits"] == min(64, device[1]), (device, x, d)
            assert plan == cuda.plan_search(device, x, x, 1, 10**6, k, d)


def test_what_the_screen_cannot_take_is_scored_whole(kernels):
    assert cuda.plan_search(H100, torch.float64, torch.float64, 1, 100, 64, 8)["source"] == "none"
    assert cuda.plan_search(H100, torch.float32, torch.float32, 1, 100, 64, 1 << 17)["source"] == "none"


def test_a_small_codebook_stays_in_shared_memory(kernels):
    many = {"heads": 1, "n": 10**6, "k": 1024}
    assert cuda.plan_search(H100, torch.float32, torch.float32, d=8, **many)["source"] == "resident"
    assert cuda.plan_search(H100, torch.bfloat16, torch.bfloat16, d=64, **many)["source"] == "resident"
    assert cuda.plan_search(DEVICES[1], torch.bfloat16, torch.bfloat16, d=64, **many)["source"] == "streamed"
