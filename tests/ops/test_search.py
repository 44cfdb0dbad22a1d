"""search: every row's index is the canonical one, whatever the data, layout, threads or machine."""

import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compare import Case, assert_same_bits, assert_same_indices, check, expected, grid, threads, whole_grid
from families import DTYPES, FAMILIES, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastvq

METRICS = ("euclidean", "cosine", "dot")
# Each backend that is not the specification, against it.
COMPILED = pytest.mark.parametrize("engine", ["cpu"])


# ---- the specification itself -----------------------------------------------------------------------------------


def by_definition(row, codes, metric):
    """The contract in Python floats, which are float64 and never fused."""
    best, index = None, None
    for k, code in enumerate(codes):
        total = 0.0
        for a, b in zip(row, code, strict=True):
            total += (a - b) * (a - b) if metric == "euclidean" else a * b
        total = total if metric == "euclidean" else -total
        rank = float("inf") if math.isnan(total) else total
        if best is None or rank < best:
            best, index, value = rank, k, total
    return index, value if metric == "euclidean" else -value


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_indices_and_distances_are_those_of_the_definition(backend, family, dtype, metric):
    for n, k, d in ((6, 9, 5), (3, 33, 1), (4, 1, 17), (2, 70, 40)):
        x, codebook = make(family, n, k, d, dtype, seed=k)
        codes = codebook.double().tolist()
        wanted = [by_definition(row, codes, metric) for row in x.double().tolist()]
        indices, distances = fastvq.search(x, codebook, metric=metric, return_distance=True, backend=backend)
        assert_same_indices(indices, torch.tensor([index for index, _ in wanted]), f"{n, k, d}")
        rounded = torch.tensor([value for _, value in wanted], dtype=torch.float64)
        assert_same_bits(distances, rounded.to(torch.float64 if dtype == "float64" else torch.float32), f"{n, k, d}")


# ---- the grid ---------------------------------------------------------------------------------------------------

BUDGET = {"budget": 250_000, "most": 511}
SOAK = {"budget": 4_000_000, "most": 4095, "seed": 1}


def test_the_grid_has_a_million_rows_and_the_soak_ten():
    assert sum(case.n for case in whole_grid(**BUDGET)) >= 1_000_000
    assert sum(case.n for case in whole_grid(**SOAK)) >= 10_000_000


@COMPILED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_index_is_canonical(engine, family, dtype):
    for case in grid(family, dtype, **BUDGET):
        check(case, engine)


@pytest.mark.soak
@COMPILED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_index_is_canonical_on_ten_million_rows(engine, family, dtype):
    for case in grid(family, dtype, **SOAK):
        check(case, engine)


@COMPILED
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_index_is_canonical_by_dot_product(engine, family, dtype, metric):
    dims, sizes = ((3, 16, 127, 256), (2, 64, 1000)) if metric == "dot" else ((7, 64), (7, 1000))
    for case in grid(family, dtype, 200_000, 255, dims=dims, sizes=sizes, metric=metric, seed=2):
        check(case, engine)


@COMPILED
@pytest.mark.parametrize("family", FAMILIES)
def test_many_rows_on_one_thread_and_on_two(engine, family):
    """Enough work for threads and for every kind of block to take part, and a last block that is not full."""
    for dtype, n, k, d in (("float32", 10007, 520, 16), ("bfloat16", 20011, 72, 8), ("float32", 3001, 1030, 33)):
        x, codebook = make(family, n, k, d, dtype, seed=3)
        wanted, distances = expected(x, codebook)
        for number in (1, 2, 3):
            with threads(number):
                found = fastvq.search(x, codebook, return_distance=True, backend=engine)
            assert_same_indices(found[0], wanted, f"{dtype}, {number} threads")
            assert_same_bits(found[1], distances, f"{dtype}, {number} threads")


# ---- layouts ----------------------------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_and_in_any_batch(engine, family):
    x, codebook = make(family, 301, 130, 19, seed=4)
    wanted, _ = expected(x, codebook)
    assert_same_indices(fastvq.search(x, codebook, backend=engine), wanted, "all at once")
    alone = torch.stack([fastvq.search(row, codebook, backend=engine) for row in x])
    assert_same_indices(alone, wanted, "each alone")
    for size in (2, 16, 31, 48, 150):
        parts = torch.cat([fastvq.search(part, codebook, backend=engine) for part in x.split(size)])
        assert_same_indices(parts, wanted, f"{size} at a time")
    order = torch.randperm(301)
    assert_same_indices(fastvq.search(x[order], codebook, backend=engine), wanted[order], "in another order")


def strided(t):
    """Every other element of every other row of something larger."""
    wide = t.new_full((2 * t.shape[0], 2 * t.shape[1] + 3), torch.nan)
    view = wide[1::2, 3::2]
    return view.copy_(t)


def transposed(t):
    return t.t().contiguous().t()


def sliced(t):
    """Columns of a wider matrix, from an odd offset, so that no row is aligned."""
    wide = t.new_full((t.shape[0], t.shape[1] + 5), torch.nan)
    return wide[:, 3:-2].copy_(t)


def late(t):
    """Rows from the end of a longer storage."""
    return torch.cat([torch.full_like(t, torch.nan), t])[t.shape[0] :]


def negated(t):
    """A view with torch's negative bit set: the memory holds the values' opposites."""
    view = torch._neg_view(-t)
    assert view.is_neg()
    return view


LAYOUTS = (strided, transposed, sliced, late, negated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_rows_and_codes(backend, layout, dtype):
    x, codebook = make("gaussian", 203, 77, 13, dtype, seed=5)
    wanted, _ = expected(x, codebook)
    assert_same_indices(fastvq.search(layout(x), codebook, backend=backend), wanted, "rows")
    assert_same_indices(fastvq.search(x, layout(codebook), backend=backend), wanted, "codes")
    assert_same_indices(fastvq.search(layout(x), layout(codebook), backend=backend), wanted, "both")


def test_expanded_rows_codes_and_columns(backend):
    x, codebook = make("gaussian", 9, 77, 13, seed=6)
    wanted, _ = expected(x, codebook)
    found = fastvq.search(x.unsqueeze(1).expand(9, 50, 13), codebook, backend=backend)
    assert_same_indices(found, wanted.unsqueeze(1).expand(9, 50), "rows repeated with stride 0")
    assert fastvq.search(x, codebook[:1].expand(77, 13), backend=backend).eq(0).all()
    column = x[:, :1].expand(9, 13)
    found = fastvq.search(column, codebook, backend=backend)
    assert_same_indices(found, expected(column.clone(), codebook)[0], "columns repeated with stride 0")


@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_first_images(backend, dtype):
    images = make("gaussian", 3 * 16, 1, 5 * 7, dtype, seed=7)[0].reshape(3, 16, 5, 7)
    codebook = make("gaussian", 1, 90, 16, dtype, seed=8)[1]
    x = images.permute(0, 2, 3, 1)
    found, distances = fastvq.search(x, codebook, return_distance=True, backend=backend)
    wanted, right = expected(x.contiguous(), codebook)
    assert found.shape == (3, 5, 7)
    assert_same_indices(found, wanted)
    assert_same_bits(distances, right)
    assert_same_indices(fastvq.search(x[:, 1:, ::2], codebook, backend=backend), wanted[:, 1:, ::2], "cropped")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 50), (4, 5, 10), (4,), (4, 0)])
def test_heads_search_their_own_codebooks(backend, shape, dtype):
    x, codebook = make("clustered", 50, 33, 11, dtype, seed=9, heads=4)
    x = x[:, : torch.Size(shape[1:]).numel()].reshape(*shape, 11)
    found, distances = fastvq.search(x, codebook, return_distance=True, backend=backend)
    assert found.shape == distances.shape == shape
    for head in range(4):
        wanted, right = expected(x[head], codebook[head])
        assert_same_indices(found[head], wanted, f"head {head}")
        assert_same_bits(distances[head], right, f"head {head}")


def test_heads_split_from_one_vector_are_not_copied_wrongly(backend):
    x, _ = make("gaussian", 60, 1, 4 * 6, seed=10)
    _, codebook = make("gaussian", 1, 21, 6, seed=11, heads=4)
    x = x.reshape(3, 20, 4, 6).permute(2, 0, 1, 3)  # (H, B, T, D), nowhere contiguous
    found = fastvq.search(x, codebook.transpose(0, 1).contiguous().transpose(0, 1), backend=backend)
    assert_same_indices(found, expected(x.contiguous(), codebook)[0])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2), (1, 1, 1, 1), (2, 3, 1, 5, 2), ()])
def test_leading_shapes(backend, shape):
    x, codebook = torch.randn(*shape, 6), torch.randn(20, 6)
    indices, distances = fastvq.search(x, codebook, return_distance=True, backend=backend)
    assert indices.shape == distances.shape == shape
    assert indices.dtype == torch.int64
    assert_same_indices(indices, expected(x, codebook)[0])


def test_one_code_and_one_dimension(backend):
    x = torch.randn(40, 1)
    assert fastvq.search(x, torch.randn(1, 1), backend=backend).eq(0).all()
    codes = torch.linspace(-2, 2, 9).unsqueeze(1)
    wanted = (x - codes.t()).abs().argmin(1)
    assert_same_indices(fastvq.search(x, codes, backend=backend), wanted)


# ---- ties and special values ------------------------------------------------------------------------------------


def test_the_first_of_equals_wins(backend):
    codes = torch.randn(500, 24)
    codes = codes[torch.arange(2000) % 500]
    x = codes[torch.randperm(2000)[:300]] + 0.01 * torch.randn(300, 24)
    assert (fastvq.search(x, codes, backend=backend) < 500).all()
    assert fastvq.search(x, codes[:1].expand(2000, 24), backend=backend).eq(0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_rows_without_any_finite_distance_get_index_0(backend, metric):
    x = torch.tensor([[torch.nan, 0.0], [torch.inf, torch.nan], [1.0, 1.0]])
    indices, distances = fastvq.search(x, torch.randn(300, 2), metric=metric, return_distance=True, backend=backend)
    assert indices[:2].tolist() == [0, 0]
    assert distances[:2].isnan().all()
    assert distances[2].isfinite()
    codes = torch.full((40, 2), torch.nan)
    assert fastvq.search(x, codes, metric=metric, backend=backend).tolist() == [0, 0, 0]
    codes[33] = 1.0
    assert fastvq.search(x[2:], codes, metric=metric, backend=backend).tolist() == [33]


def test_a_difference_below_float32_decides(backend):
    """Codes one last place of float32 apart, their squared distances 4 and 4 + 1e-14: only float64 tells them apart."""
    step = torch.finfo(torch.float32).eps
    codes = torch.tensor([[1.0, 1.0 + step], [1.0, 1.0], [1.0, 1.0 + 2 * step]])
    x = torch.tensor([[-1.0, 1.0], [-1.0, 1.0 + step], [-1.0, 1.0 + 2 * step]])
    assert fastvq.search(x, codes, backend=backend).tolist() == [1, 0, 2]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"huge", "tiny", "largest", "not_finite"}))
@pytest.mark.parametrize("metric", METRICS)
def test_fast_precision_is_within_float32_rounding_of_the_best(backend, family, metric):
    for n, k, d in ((300, 257, 3), (300, 1000, 32), (50, 100, 300)):
        x, codebook = make(family, n, k, d, seed=12)
        if metric == "cosine":
            codebook = torch.nn.functional.normalize(codebook, dim=-1)
        indices = fastvq.search(x, codebook, metric=metric, precision="fast", backend=backend)
        x, codebook = x.double(), codebook.double()
        distances = (x.unsqueeze(1) - codebook).square().sum(-1) if metric == "euclidean" else -x @ codebook.t()
        excess = distances.gather(1, indices.unsqueeze(1)).squeeze(1) - distances.min(1).values
        size = x.norm(dim=1) + codebook.norm(dim=1).max()
        assert (excess <= torch.finfo(torch.float32).eps * (d + 8) * size.square()).all(), f"{n, k, d}"


@pytest.mark.parametrize("family", ["huge", "tiny", "largest", "not_finite"])
def test_fast_precision_gives_valid_indices_on_any_data(backend, family):
    x, codebook = make(family, 500, 100, 12, seed=13)
    indices = fastvq.search(x, codebook, precision="fast", backend=backend)
    assert indices.min() >= 0
    assert indices.max() < 100


# ---- properties -------------------------------------------------------------------------------------------------

VALUES = st.lists(st.floats(width=32), min_size=1, max_size=8)


@st.composite
def matrices(draw, rows, columns, pool, generator):
    """A (rows, columns) matrix of values from a small pool, so that ties abound, under some layout."""
    picked = torch.tensor(pool, dtype=torch.float64)[torch.randint(len(pool), (rows, columns), generator=generator)]
    if draw(st.booleans()):
        picked = picked + torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    return picked, draw(st.sampled_from([lambda t: t, *LAYOUTS]))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize("engine", ["cpu"])
def test_any_shape_layout_dtype_and_values(engine, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    n, k, d = (data.draw(st.integers(low, 70)) for low in (0, 1, 1))
    pool = data.draw(VALUES)
    x_dtype, code_dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    x, x_layout = data.draw(matrices(n, d, pool, generator))
    codebook, code_layout = data.draw(matrices(k, d, pool, generator))
    x, codebook = x.to(x_dtype), codebook.to(code_dtype)
    metric = data.draw(st.sampled_from(METRICS))
    wanted, right = expected(x, codebook, metric)
    options = {"metric": metric, "return_distance": True, "backend": engine}
    found, distances = fastvq.search(x_layout(x), code_layout(codebook), **options)
    assert_same_indices(found, wanted)
    assert_same_bits(distances, right)


# ---- surroundings -----------------------------------------------------------------------------------------------


def instruction_sets():
    """The sets that this machine can run, by the names FASTVQ_CPU_ISA knows."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    avx2 = {"avx2", "fma", "bmi2"}
    sets = {"portable": set(), "avx2": avx2, "avxvnni": avx2 | {"avx_vnni"}}
    sets |= {"avx512": avx512, "avx512vnni": avx512 | {"avx512_vnni"}}
    return [
        pytest.param(name, marks=pytest.mark.skipif(not need <= flags, reason=f"this processor has no {name}"))
        for name, need in sets.items()
    ]


def run_python(code, *arguments, **environment):
    """Run code in a fresh process that can import the test helpers."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


REDUCED = """
import torch
from compare import check, whole_grid
torch.set_num_threads(2)
rows = 0
for metric, dims in (("euclidean", (1, 8, 31, 252)), ("dot", (7,))):
    for case in whole_grid(30_000, 63, dims=dims, sizes=(1, 7, 64, 1000), metric=metric, seed=4):
        check(case, "cpu")
        rows += case.n
print(rows)
"""


@pytest.mark.parametrize("isa", instruction_sets())
def test_each_instruction_set_gives_the_same_indices(isa):
    done = run_python(REDUCED, FASTVQ_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20_000


def test_an_unknown_instruction_set_is_refused():
    code = "import torch, fastvq; fastvq.search(torch.randn(3, 4), torch.randn(5, 4), backend='cpu')"
    done = run_python(code, FASTVQ_CPU_ISA="sse1")
    assert done.returncode != 0
    assert "FASTVQ_CPU_ISA must be one of" in done.stderr
    assert "got 'sse1'" in done.stderr


@COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(engine, dtype):
    x, codebook = make("offset", 500, 300, 24, seed=14)
    wanted, right = expected(x, codebook)
    with torch.autocast("cpu", dtype=dtype):
        found, distances = fastvq.search(x, codebook, return_distance=True, backend=engine)
    assert_same_indices(found, wanted)
    assert_same_bits(distances, right)


@COMPILED
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_flushing_subnormals_changes_nothing(engine, dtype):
    x, codebook = make("tiny", 4001, 300, 24, dtype, seed=15)
    wanted, right = expected(x, codebook)
    assert wanted.unique().numel() > 100
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        found, distances = fastvq.search(x, codebook, return_distance=True, backend=engine)
    finally:
        torch.set_flush_denormal(False)
    assert_same_indices(found, wanted)
    assert_same_bits(distances, right)


@COMPILED
def test_four_python_threads_at_once(engine):
    jobs = [make(family, 3001, 200 + 10 * i, 16 + i, seed=i) for i, family in enumerate(FAMILIES)]
    wanted = [expected(*job)[0] for job in jobs]
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        return [[fastvq.search(*job, backend=engine) for job in jobs] for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for rounds in pool.map(work, range(4)):
            for found in rounds:
                for index, (mine, right) in enumerate(zip(found, wanted, strict=True)):
                    assert_same_indices(mine, right, f"job {index}")


@COMPILED
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.timeout(120)
def test_after_a_fork(engine):
    """The child has none of its parent's threads; it must neither hang nor differ."""
    x, codebook = make("gaussian", 8009, 500, 32, seed=16)
    wanted = fastvq.search(x, codebook, backend=engine)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if torch.equal(fastvq.search(x, codebook, backend=engine), wanted) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert_same_indices(fastvq.search(x, codebook, backend=engine), wanted, "the parent, afterwards")


class Searches(torch.utils.data.Dataset):
    """Searches in whatever process asks."""

    def __init__(self, x, codebook, engine):
        self.x, self.codebook, self.engine = x, codebook, engine

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return fastvq.search(self.x[index], self.codebook, backend=self.engine)


@COMPILED
@pytest.mark.timeout(120)
def test_in_the_workers_of_a_data_loader(engine):
    x, codebook = make("gaussian", 4 * 2003, 300, 16, seed=17)
    wanted = fastvq.search(x, codebook, backend=engine)
    loader = torch.utils.data.DataLoader(Searches(x.reshape(4, 2003, 16), codebook, engine), num_workers=2)
    assert_same_indices(torch.cat([part.flatten() for part in loader]), wanted)


def test_inputs_are_left_alone_and_outputs_have_no_gradient(backend):
    x = torch.randn(50, 8, requires_grad=True)
    codebook = torch.nn.Parameter(torch.randn(20, 8))
    before = x.detach().clone(), codebook.detach().clone()
    indices, distances = fastvq.search(x, codebook, return_distance=True, backend=backend)
    assert not indices.requires_grad
    assert not distances.requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(codebook, before[1])
    assert indices.is_contiguous()


def test_a_codebook_changed_in_place_is_seen(backend):
    """Nothing kept from an earlier call may outlive the codes it was made from; .data leaves no trace of a change."""
    x, codebook = make("gaussian", 400, 64, 16, seed=18)
    for _ in range(3):
        assert_same_indices(fastvq.search(x, codebook, backend=backend), expected(x, codebook)[0])
        codebook.data[3:40] = torch.randn(37, 16)


def test_the_backend_is_the_one_asked_for(monkeypatch):
    """The argument wins over the context, the context over the environment."""
    from fastvq.backends import cpu, reference

    served = []
    for name, module in (("reference", reference), ("cpu", cpu)):
        real = module.search

        def record(*arguments, name=name, real=real):
            served.append(name)
            return real(*arguments)

        monkeypatch.setattr(module, "search", record)
    x, codebook = torch.randn(3, 4), torch.randn(5, 4)
    fastvq.search(x, codebook)
    fastvq.search(x, codebook, backend="auto")
    monkeypatch.setenv("FASTVQ_BACKEND", "reference")
    fastvq.search(x, codebook)
    with fastvq.use_backend("cpu"):
        fastvq.search(x, codebook)
        with fastvq.use_backend("reference"):
            fastvq.search(x, codebook)
            fastvq.search(x, codebook, backend="cpu")
        fastvq.search(x, codebook)
    fastvq.search(x, codebook)
    assert served == ["cpu", "cpu", "reference", "cpu", "reference", "cpu", "cpu", "reference"]


def test_the_order_of_the_cases_is_not_the_data():
    """Two cases of the grid never draw the same numbers."""
    first, second = (Case("gaussian", "float32", 5, 7, d, 0) for d in (2, 3))
    assert make(first.family, 5, 7, 2)[0].shape != make(second.family, 5, 7, 3)[0].shape


def test_rows_of_more_dimensions_than_kernels_take(backend):
    x, codebook = torch.randn(2, *[1] * 10, 3, 2, 5), torch.randn(7, 5)
    books, quantized = torch.randn(2, 7, 5), fastvq.vector_quantize(x, codebook, backend=backend)[0]
    assert torch.equal(
        fastvq.search(x, codebook, backend=backend).flatten(),
        fastvq.search(x.flatten(0, -2), codebook, backend=backend),
    )
    assert torch.equal(quantized.flatten(0, -2), fastvq.vector_quantize(x.flatten(0, -2), codebook)[0])
    found = fastvq.search(x.mT, torch.randn(2, 7, 2), backend=backend)
    assert found.shape == x.mT.shape[:-1]
    by_head, values = fastvq.search(x, books, return_distance=True, backend=backend)
    right, distances = fastvq.search(x.flatten(1, -2), books, return_distance=True, backend=backend)
    assert torch.equal(by_head.flatten(1), right)
    assert torch.equal(values.flatten(1), distances)
