"""The counts of `fastvq profile`: which rows the screen left open, and which took float64."""

import pytest
import torch
from families import make

from fastvq.backends import cpu


def counts(x, codebook):
    return cpu.search_counts(x, codebook)


@pytest.mark.parametrize("number", [1, 2])
def test_easy_rows_are_settled_by_the_screen(number):
    torch.set_num_threads(number)
    # Pairs of codes far from one another, rows at a code: nothing else comes near.
    codebook = torch.eye(64) * 100
    x = codebook[torch.arange(1003) % 64] + 0.01 * torch.randn(1003, 64)
    assert counts(x, codebook) == (1003, 0, 0)
    assert counts(x, codebook[:1]) == (1003, 0, 0)


def test_ties_take_float64():
    x, codebook = make("near_tied", 500, 90, 12)
    rows, second_look, exact = counts(x, codebook)
    assert rows == 500
    assert 450 < exact <= second_look  # a few codes are copies bit for bit: of these only the first is a code
    rows, second_look, exact = counts(*make("gaussian", 500, 900, 12))
    assert rows == 500
    assert exact <= second_look
    assert exact < 25


def test_what_is_not_screened_takes_float64():
    x, codebook = make("gaussian", 100, 90, 12)
    assert counts(x.double(), codebook) == (100, 100, 100)
    x[7, 3] = torch.nan
    rows, second_look, exact = counts(x, codebook)
    assert rows == 100
    assert 1 <= exact <= second_look


def test_no_rows():
    assert counts(torch.empty(0, 5), torch.randn(3, 5)) == (0, 0, 0)
