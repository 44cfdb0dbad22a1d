"""The kernels that share memory once more, every access to it watched: no two threads race for a byte of it."""

import pytest
import torch
from compare import assert_same_indices
from families import make
from shimmed import RACES, ROOT, compile_mutant, dies, load_module, relink

from fastvq.backends import cuda, reference

# One source a kind of kernel: resident, streamed, chunked and staged screens, the whole rows, sums and losses.
SOURCES = (
    "search_split",
    "search_rounded",
    "search_stages",
    "search_rest",
    "small_sums",
    "vector_quantize",
    "ema_update",
)


@pytest.fixture(scope="module")
def watched(shim_module, tmp_path_factory):
    """The module with these sources compiled so that they announce their accesses."""
    sources = [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in SOURCES]
    return load_module(relink(shim_module, tmp_path_factory.mktemp("watched"), sources, RACES))


@pytest.fixture(autouse=True)
def kernels(watched, monkeypatch):
    monkeypatch.setattr(cuda, "_kernels", watched)
    return watched


@pytest.mark.parametrize("device", [(90, 132, 232_448), (90, 1, 232_448)], ids=["many", "one"])
@pytest.mark.parametrize(("n", "k", "d"), [(70, 600, 4), (140, 300, 40), (600, 150, 8), (20, 130, 300)])
def test_searches(n, k, d, device, monkeypatch):
    monkeypatch.setattr(cuda, "_device", lambda _: device)
    x, codebook = make("near_tied", n, k, d, seed=n)
    codebook[::5] = codebook[0]  # and rows that are queued
    assert_same_indices(
        cuda.search(x, codebook, "euclidean", False, "exact")[0],
        reference.search(x, codebook, "euclidean", False, "exact")[0],
    )


def test_the_other_operators():
    x, codebook = make("gaussian", 300, 40, 24)
    indices = torch.randint(40, (300,))
    cuda.gather(x, codebook, indices, 1.0, None)
    x[::7, 5] = torch.nan
    cuda.gather(x, codebook, indices, 1.0, None, torch.zeros(40, dtype=torch.int64))
    x[::7, 5] = 0.0
    cuda.vector_quantize_backward(x, torch.tensor(1.0), x, codebook, indices, None, 0.5, 1.0, True, True)
    counts, sums = cuda.code_sums(x, indices, 40, None, False)
    cuda.ema_update_(codebook.clone(), counts + 1, sums.clone(), counts, sums, 0.9, 1e-5)
    books = torch.stack([codebook, codebook * 0.5, codebook * 0.25])
    stages = cuda.residual_quantize(x, books, "euclidean")[1]
    cuda.residual_quantize_backward(x, torch.ones(3), x, books, stages, True, True)


@pytest.mark.parametrize(("d", "dtype"), [(24, "float32"), (130, "float32"), (258, "float32"), (70, "float64")])
def test_the_stages_of_a_residual_quantiser(d, dtype):
    x, codes = make("near_tied", 70, 3 * 96, d, dtype)
    codebooks = codes.view(3, 96, d)
    codebooks[1, ::4] = codebooks[1, 0]  # and rows that a warp looks at whole
    wanted = reference.residual_quantize(x, codebooks, "euclidean")[1]
    assert_same_indices(cuda.residual_search(x, codebooks, "euclidean"), wanted)


def test_a_barrier_that_is_dropped_is_a_race(shim_module, tmp_path):
    """That of the pipeline: without it a tile is copied over one that another warp still reads."""
    change = {"search_screen.h": {"    __syncthreads();  // the tile is there for all": "    //"}}
    module = load_module(compile_mutant(shim_module, tmp_path, "search_split", change, RACES))
    call = "import torch; cuda.search(torch.ones(40, 8), torch.ones(900, 8), 'euclidean', False, 'exact')"
    assert ": race: it " in dies(module, call)
