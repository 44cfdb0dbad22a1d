"""Perplexity, usage and PSNR, on counts whose answers are known."""

import math

import pytest
import torch

from fastvq.training.metrics import CodebookUse, code_counts, mean_squared_error, psnr


@pytest.mark.parametrize(
    ("counts", "perplexity", "usage", "dead"),
    [
        ([5, 5, 5, 5], 4.0, 1.0, 0),
        ([9, 0, 0, 0], 1.0, 0.25, 3),
        ([8, 8, 0, 0], 2.0, 0.5, 2),
        ([1, 3], math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)), 1.0, 0),
        ([0, 0], 1.0, 0.0, 2),
    ],
)
def test_use_of_known_counts(counts, perplexity, usage, dead):
    use = CodebookUse.of(torch.tensor(counts))
    assert use.perplexity == pytest.approx(perplexity)
    assert (use.usage, use.dead) == (usage, dead)


def test_counts_of_codes():
    assert code_counts(torch.tensor([[0, 3], [3, 1]]), 5).tolist() == [1, 1, 0, 2, 0]


def test_psnr():
    assert psnr(0.01) == pytest.approx(20.0)
    assert psnr(0.0) == math.inf


def test_mean_squared_error_of_bytes():
    first, second = torch.zeros(1, 1, 2, dtype=torch.uint8), torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert mean_squared_error(first, second) == 0.5
    assert mean_squared_error(second, first) == 0.5
