"""The entropies of LFQ against the softmax over all codes: value, gradient, memory."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvq.nn import binary_entropy
from fastvq.nn.binary_entropy import bit_entropies, entropy


def naive(logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the probabilities (C, N, 2^d) of every code for every row."""
    bits = logits.shape[-1]
    codes = (torch.arange(2**bits).unsqueeze(-1) >> torch.arange(bits - 1, -1, -1) & 1) * 2.0 - 1.0
    probabilities = (logits @ codes.to(logits).t() / 2).softmax(-1)
    mean = torch.einsum("cnk,n->ck", probabilities, weights)
    return (entropy(probabilities) * weights).sum() / len(logits), mean


def losses_and_gradient(function: Any, logits: Tensor, weights: Tensor) -> list[Tensor]:
    """The two entropies, and the gradient of a sum of both."""
    leaf = logits.clone().requires_grad_()
    mean_entropy, mean = function(leaf, weights)
    of_mean = entropy(mean).mean()
    (gradient,) = torch.autograd.grad(mean_entropy - 0.7 * of_mean, leaf)
    return [mean_entropy.detach(), of_mean.detach(), mean.detach(), gradient]


def example(bits: int, scale: float, codebooks: int = 1, rows: int = 23) -> tuple[Tensor, Tensor]:
    logits = torch.randn(codebooks, rows, bits, dtype=torch.float64) * scale
    weights = torch.rand(rows, dtype=torch.float64)
    weights[3] = 0.0
    return logits, weights / weights.sum()


@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0, 400.0])
@pytest.mark.parametrize("bits", [1, 2, 7, 10])
def test_is_the_naive_formula(bits: int, scale: float, codebooks: int) -> None:
    case = example(bits, scale, codebooks)
    for mine, other in zip(losses_and_gradient(bit_entropies, *case), losses_and_gradient(naive, *case), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 2.0, 50.0])
def test_is_the_naive_formula_where_most_codes_are_below_the_floor(scale: float) -> None:
    """With 2^17 codes even the uniform distribution is."""
    case = example(17, scale, rows=5)
    for mine, other in zip(losses_and_gradient(bit_entropies, *case), losses_and_gradient(naive, *case), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = example(6, 2.0, 2)
    whole = losses_and_gradient(bit_entropies, *case)
    monkeypatch.setattr(binary_entropy, "_PIECE", 100)
    for mine, other in zip(losses_and_gradient(bit_entropies, *case), whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_float32_is_no_worse_than_the_naive_formula(scale: float) -> None:
    logits, weights = example(12, scale, rows=50)
    right = losses_and_gradient(naive, logits, weights)
    narrow = logits.float(), weights.float()
    mine, other = losses_and_gradient(bit_entropies, *narrow), losses_and_gradient(naive, *narrow)
    for a, b, r in zip(mine, other, right, strict=True):
        tolerance = 1e-6 * max(1.0, float(r.abs().max()))
        assert float((a - r).abs().max()) <= float((b - r).abs().max()) + tolerance


FAULTS = {
    "one code too many above the floor": ("_prefix_sums", lambda right, o, v, left: right(o, v, left=left).roll(1, -1)),
    "no gradient to one half": ("_to_logits", lambda right, x, u, v: right(x, u, torch.zeros_like(v))),
    "certain bits": ("_log_probabilities", lambda right, x: right(x.clamp(-2.0, 2.0))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(binary_entropy, name, functools.partial(wrong, getattr(binary_entropy, name)))
    case = example(7, 2.0)
    found, wanted = losses_and_gradient(bit_entropies, *case), losses_and_gradient(naive, *case)
    assert any(not torch.allclose(mine, other, rtol=1e-6) for mine, other in zip(found, wanted, strict=True))


# Peak above what stood before, of a training step on N rows of 2^d codes; every block is mapped by itself.
MEASURE = """
import sys
import torch
import fastvq
from fastvq.measure.memory import peak_mib

torch.set_num_threads(2)
rows, bits = map(int, sys.argv[1:])

def step(rows, bits):
    layer = fastvq.LFQ(dim=bits)
    x = torch.randn(1, rows, bits, requires_grad=True)
    def call():
        quantized, indices, loss = layer(x)
        (quantized.sum() + loss).backward()
    return call

step(16, 6)()
print(peak_mib(step(rows, bits)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="this system tells no peak memory")
def test_two_to_the_18_codes_in_under_100_mib() -> None:
    def peak_mib(rows: int, bits: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(rows), str(bits)],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return float(done.stdout)

    peak = peak_mib(4096, 18)  # rows times codes would be 4096 MiB
    assert peak < 100, f"{peak:.1f} MiB"
