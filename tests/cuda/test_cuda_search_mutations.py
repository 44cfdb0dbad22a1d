"""Each safeguard of the CUDA search is needed: without it the named case comes out wrong."""

import pytest
import torch
from families import make
from shimmed import compile_mutant, load_module

from fastvq.backends import cuda, reference

pytestmark = pytest.mark.usefixtures("kernels")

# One multiprocessor: the codes are not split, and one kernel does it all.
ON = (90, 1, 232_448)


def half_way(d, noise, times):
    """Rows half way between two neighbours on a line: the rounding of the screen decides, and most often wrongly."""
    generator = torch.Generator().manual_seed(d)
    codebook, x = torch.zeros(256, d), torch.zeros(times * 255, d)
    codebook[:, 0] = torch.randn(256, generator=generator)
    line = codebook[:, 0].sort().values
    middle = (line[1:] + line[:-1]) / 2
    x[:, 0] = (middle + noise * torch.randn(times, 255, generator=generator)).reshape(-1)
    return x, codebook


def crowded():
    """Rows with more candidates than are kept of a lane: they go to the queue."""
    _, codebook = make("gaussian", 64, 512, 24)
    codebook[1::4] = codebook[1] + 1e-5 * torch.randn(128, 24)
    return codebook[1] + 1e-4 * torch.randn(64, 24), codebook


def tied():
    """Integers: exact ties, within a group and between groups."""
    return make("integers", 64, 120, 3)


def wrong_rows(x, codebook, slack=1.0):
    """How many indices are not the reference's; what is never written is an impossible one."""
    wanted, _ = reference.search(x, codebook, "euclidean", False, "exact")
    found, _ = cuda.certified_search(x, codebook, "euclidean", False, slack)
    return int((found != wanted).sum())


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(cuda, "_device", lambda _: ON)
    empty = cuda._empty
    monkeypatch.setattr(cuda, "_empty", lambda shape, dtype, like: empty(shape, dtype, like).fill_(113))


# Of many dimensions the error of the sums has a share in the bound that this case does not draw on.
CASES = {
    "rounded": (half_way(17, 1e-6, 2), (0.0, 0.25)),
    "split": (half_way(1, 1e-7, 16), (0.0, 0.25)),
    "chunked": (half_way(257, 1e-6, 1), (0.0,)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_needed(case):
    rows, too_small = CASES[case]
    assert wrong_rows(*rows) == 0
    for slack in too_small:
        assert wrong_rows(*rows, slack) > 0


# What is taken away: the case that shows it, the source that is compiled again, and its text.
MUTANTS = {
    "no queue": (
        crowded,
        "search",
        {
            "search.cu": {
                "  score_rest(p, plan, scratch, 1, device.multiprocessors, indices, distances, stream);\n}": "}"
            }
        },
    ),
    "the last tie": (
        tied,
        "search_split",
        {
            "search_screen.h": {
                "other_code < code && other < inf()": "(other_code > code || code == kNobody) && other < inf()"
            }
        },
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_without_it_the_case_comes_out_wrong(name, kernels, tmp_path, monkeypatch):
    case, source, changes = MUTANTS[name]
    assert wrong_rows(*case()) == 0
    monkeypatch.setattr(cuda, "_kernels", load_module(compile_mutant(kernels, tmp_path, source, changes)))
    assert wrong_rows(*case()) > 0
