"""Codebooks that are stacked anew, or known to be the same: the codes are those of the codebooks as they are."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fastvq
from fastvq.interop.residual import fixed_codes, one_call, residual_codes, stacked_codes


def books(stages: int = 5, size: int = 130, width: int = 16) -> list[torch.Tensor]:
    return [torch.randn(size, width) * 0.9**stage for stage in range(stages)]


def expected(latents, codebooks):
    rows = latents.transpose(1, 2)
    return fastvq.residual_quantize(rows, torch.stack(codebooks), backend="reference")[1].permute(2, 0, 1)


@pytest.mark.parametrize("way", [stacked_codes, fixed_codes])
@pytest.mark.parametrize("frames", [1, 3, 70])
def test_codebooks_that_change(way, frames):
    owner, codebooks, x = nn.Identity(), books(), torch.randn(2, 16, frames)
    for step in range(4):
        if step == 2:
            codebooks[3].neg_()
        if step == 3:
            codebooks[1] = -codebooks[1]
        for count in (5, 2, 5):
            found = way(owner, x, codebooks[:count])
            assert found.equal(expected(x, codebooks[:count]))
            assert found.is_contiguous()


@pytest.mark.parametrize("frames", [1, 70])
def test_fewer_stages_first(frames):
    owner, codebooks, x = nn.Identity(), books(), torch.randn(2, 16, frames)
    for count in (1, 3, 5, 4):
        assert fixed_codes(owner, x, codebooks[:count]).equal(expected(x, codebooks[:count]))


def test_memory_that_is_used_again():
    """Other codes may come to lie where packed ones lay; they are not taken for them."""
    x = torch.randn(2, 16, 70)
    for _ in range(8):
        owner, codebooks = nn.Identity(), books()
        for _ in range(2):
            assert fixed_codes(owner, x, codebooks).equal(expected(x, codebooks))
        del owner, codebooks


def test_inference_mode():
    owner, x = nn.Identity(), torch.randn(2, 16, 9)
    for way in (stacked_codes, fixed_codes):
        with torch.inference_mode():
            codebooks = books()
            first = way(owner, x, codebooks)
        assert way(owner, x, codebooks).equal(first)
        assert first.equal(expected(x, codebooks))


def test_threads():
    owner, codebooks, x = nn.Identity(), books(), torch.randn(2, 16, 50)
    want, wrong = expected(x, codebooks), []

    def work(way):
        for _ in range(30):
            if not way(owner, x, codebooks).equal(want):
                wrong.append(way)

    threads = [threading.Thread(target=work, args=(way,)) for way in (stacked_codes, fixed_codes) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_large_codebooks_and_few_rows():
    """Where a few rows of codes that may change are searched without packing."""
    owner, x = nn.Identity(), torch.randn(1, 256, 2)
    codebooks = [torch.randn(2048, 256) for _ in range(2)]
    for _ in range(3):
        found = fixed_codes(owner, x, codebooks)
        assert found.equal(residual_codes(x, torch.stack(codebooks)))
    codebooks[0].mul_(-1)
    assert fixed_codes(owner, x, codebooks).equal(residual_codes(x, torch.stack(codebooks)))


def test_one_call():
    x, codebooks = torch.randn(1, 16, 3), books()
    assert one_call(x, codebooks)
    assert one_call(x.double(), [c.double() for c in codebooks])
    assert not one_call(x, [])
    assert not one_call(x.bfloat16(), [c.bfloat16() for c in codebooks])
    assert not one_call(x, [c.double() for c in codebooks])
    assert not one_call(x, [*codebooks, torch.randn(131, 16)])
    assert not one_call(x[0], codebooks)
