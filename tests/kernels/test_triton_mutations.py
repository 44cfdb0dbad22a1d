"""Each safeguard of Triton's search is needed: a copy of the module without it gets the named case wrong."""

import importlib.util
import inspect
import sys

import pytest
import torch
from families import make
from fastvq.kernels import search as kernels
from guard import GuardedAllocations, on_device

from fastvq.backends import reference


def half_way():
    """Rows half way between two neighbours on a line: rounding to float16 decides, and most often wrongly."""
    codebook = torch.randn(64, 1)
    line = codebook[:, 0].sort().values
    middle = (line[1:] + line[:-1]) / 2
    return (middle + 1e-6 * torch.randn(8, 63)).reshape(-1, 1), codebook


def crowded():
    """Rows with more candidates than the list of a row holds: they go to the queue."""
    _, codebook = make("gaussian", 64, 512, 24)
    codebook[1::4] = codebook[1] + 1e-5 * torch.randn(128, 24)
    return codebook[1] + 1e-4 * torch.randn(64, 24), codebook


def crowded_ties():
    """The same, so close to each other that float32 cannot tell them apart."""
    _, codebook = make("gaussian", 64, 512, 24)
    codebook[1::4] = codebook[1] + 1e-7 * torch.randn(128, 24)
    return codebook[1] + torch.randn(32, 24), codebook


def tied():
    """Integers: exact ties, within a group and between groups."""
    return make("integers", 64, 40, 3)


CASES = {"half_way": half_way, "crowded": crowded, "crowded_ties": crowded_ties, "tied": tied}

# What is taken away: the case that shows it, and the lines of the source that do it.
MUTANTS = {
    "no certificate": ("half_way", {"width = SLACK * (": "width = 0 * ("}),
    "a quarter of the bound": ("half_way", {"width = SLACK * (": "width = 0.25 * ("}),
    "no queue": ("crowded", {"whole = whole | (group == WHOLE)": "whole = whole | (group < NONE - 1)"}),
    "the last tie": (
        "tied",
        {
            "tl.where(score < winning, code, winner)": "tl.where(score <= winning, code, winner)",
            'tl.min(tl.where((score == least) & (least < float("inf")), code, NOBODY), axis=1)': (
                'tl.max(tl.where((score == least) & (least < float("inf")), code, -1), axis=1)'
            ),
        },
    ),
    "no contract for rows of the queue": (
        "crowded_ties",
        {"> 0:\n        winning = tl.full((1, COLUMNS)": "> 1:\n        winning = tl.full((1, COLUMNS)"},
    ),
    "a contract that leaves out ties": ("crowded_ties", {"(low <= reached[:, None])": "(low < lowest)"}),
}


def mutant(folder, changes):
    """A copy of the module with some of its text changed, each piece at the one place where it stands."""
    source = inspect.getsource(kernels)
    for old, new in changes.items():
        assert source.count(old) == 1, f"{old!r} stands in {source.count(old)} places"
        source = source.replace(old, new)
    path = folder / "mutant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("fastvq.kernels.mutant", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def wrong_rows(module, x, codebook):
    """How many indices are not the reference's; what is never written is poison."""
    wanted, _ = reference.search(x, codebook, "euclidean", False, "exact")
    with GuardedAllocations():
        found, _ = module.search(*on_device(x, codebook), "euclidean", False)
    return int((found.cpu() != wanted).sum())


@pytest.mark.parametrize("case", CASES)
def test_the_search_as_it_is_gets_the_case_right(case, tmp_path):
    assert wrong_rows(mutant(tmp_path, {}), *CASES[case]()) == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_without_it_the_case_comes_out_wrong(name, tmp_path):
    case, changes = MUTANTS[name]
    assert wrong_rows(mutant(tmp_path, changes), *CASES[case]()) > 0
