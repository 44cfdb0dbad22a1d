"""The cured interpreter computes what the devices compute; torch's own bfloat16 and exact fractions judge."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compare import assert_same_bits
from interpreter import fused, narrow, widen

SPECIALS = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 3.0e38, 1e-38, 1e-40, 255.5]


def values(dtype, n=512, seed=0):
    """Numbers of all magnitudes, with the special ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, dtype=torch.float64, generator=generator)
    drawn *= torch.exp2(torch.randint(-20, 20, (n,), generator=generator))
    drawn[: len(SPECIALS)] = torch.tensor(SPECIALS, dtype=torch.float64)
    return drawn.to(dtype)


def test_narrow_and_widen_are_torchs_conversions():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    wide = torch.from_numpy(widen(bits.numpy().view(np.uint16)))
    assert_same_bits(wide, bits.view(torch.bfloat16).float())
    # Every bfloat16, its neighbours at a quarter, a half and three quarters of the way, and the ties.
    for below in (0, 0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000):
        x = (bits.to(torch.int32) << 16 | below).view(torch.float32)
        found = torch.from_numpy(narrow(x.numpy()).view(np.int16)).view(torch.bfloat16)
        assert_same_bits(found, x.to(torch.bfloat16))


def test_fused_rounds_once():
    generator = np.random.default_rng(0)
    scale = 2.0 ** generator.integers(-30, 30, 4000)
    x, y = generator.standard_normal((2, 4000)).astype(np.float32)
    z = (generator.standard_normal(4000) * scale).astype(np.float32)
    z[:1000] = -(x * y)[:1000]  # nothing but the rounding error is left
    # A product that ends just above a tie of float32, by less than float64 sees: rounding twice goes wrong.
    x[-1], y[-1], z[-1] = 1 + 2.0**-12, 2.0**-60, 1 + 2.0**-23
    x[-2], y[-2], z[-2] = 2.0**-24, 1 + 2.0**-23, 1.0
    x[-3], y[-3], z[-3] = 2.0**-24, 1 - 2.0**-24, 1 + 2.0**-23
    found = fused(x, y, z)
    for a, b, c, result in zip(x, y, z, found, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        near = [result, np.nextafter(result, np.float32(np.inf)), np.nextafter(result, np.float32(-np.inf))]
        distances = [abs(Fraction(float(r)) - exact) for r in near]
        assert distances[0] == min(distances), (a, b, c)
        if distances.count(distances[0]) == 2:  # a tie goes to the even one
            assert result.view(np.int32) % 2 == 0, (a, b, c)


@triton.jit
def _arithmetic(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(x + at, mask=inside, other=0.0)
    b = tl.load(y + at, mask=inside, other=1.0)
    tl.store(out + at, a + b, mask=inside)
    tl.store(out + n + at, a * b, mask=inside)
    tl.store(out + 2 * n + at, a - b, mask=inside)
    tl.store(out + 3 * n + at, tl.where(a < b, a, b), mask=inside)
    tl.store(out + 4 * n + at, tl.abs(a), mask=inside)
    tl.store(out + 5 * n + at, -a, mask=inside)
    tl.store(out + 6 * n + at, (a.to(tl.float32) * 3.0).to(tl.bfloat16), mask=inside)
    tl.store(out + 7 * n + at, a.to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(out + 8 * n + at, a + 0.5, mask=inside)


def test_bfloat16_arithmetic_is_torchs():
    x, y = values(torch.bfloat16), values(torch.bfloat16, seed=1).flip(0)
    out = torch.empty(9, len(x), dtype=torch.bfloat16)
    _arithmetic[(triton.cdiv(len(x), 128),)](x, y, out, len(x), BLOCK=128)
    wanted = [x + y, x * y, x - y, torch.where(x < y, x, y), x.abs(), -x, (x.float() * 3).bfloat16(), x, x + 0.5]
    for found, expected in zip(out, wanted, strict=True):
        assert_same_bits(found.contiguous(), expected)


@triton.jit
def _cast(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n).to(out.dtype.element_ty), mask=at < n)


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_casts_round_once(source, target):
    x = values(source)
    out = torch.empty(len(x), dtype=target)
    _cast[(1,)](x, out, len(x), BLOCK=512)
    if (source, target) == (torch.float64, torch.bfloat16):  # torch rounds twice here, the devices once
        x = x.float().where(x.float().double() == x, (x.float().view(torch.int32) | 1).view(torch.float32))
    assert_same_bits(out, x.to(target))


def test_float64_to_bfloat16_is_rounded_once():
    just_above_a_tie = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40], dtype=torch.float64)
    out = torch.empty(2, dtype=torch.bfloat16)
    _cast[(1,)](just_above_a_tie, out, 2, BLOCK=2)
    assert out.tolist() == [1 + 2.0**-7, 1.0]


@triton.jit
def _dot(x, y, out, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(x + row * BLOCK + column), tl.load(y + row * BLOCK + column)
    tl.store(out + row * BLOCK + column, tl.dot(a, b.T))


def test_bfloat16_dot_is_a_float32_matmul_of_the_values():
    x, y = (torch.randint(-64, 64, (16, 16)).bfloat16() / 8 for _ in range(2))  # exact in any order
    out = torch.empty(16, 16)
    _dot[(1,)](x, y, out, BLOCK=16)
    assert_same_bits(out, x.float() @ y.float().t())


@triton.jit
def _reduce(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    block = tl.load(x + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out + rows, tl.min(block, axis=1))
    tl.store(out + ROWS + rows, tl.max(block, axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_min_and_max_pass_nan_over(dtype):
    x = torch.tensor([[1.0, torch.nan, -2.0, 4.0], [torch.nan] * 4], dtype=dtype)
    out = torch.empty(2, 2, dtype=dtype)
    _reduce[(1,)](x, out, ROWS=2, COLUMNS=4)
    assert_same_bits(out, torch.tensor([[-2.0, torch.nan], [4.0, torch.nan]], dtype=dtype))


@triton.jit
def _fma(x, y, z, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def test_tl_fma_is_fused():
    x = torch.full((4,), 1 + 2.0**-12)
    out = torch.empty(4)
    _fma[(1,)](x, x, -(x * x), out, BLOCK=4)
    assert (out == 2.0**-24).all()


@triton.jit
def _overlapping(out, width, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(out + row * width + column, row + column * 0)


@triton.jit
def _same_place(out, SIZE: tl.constexpr, APART: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out + program * APART + tl.arange(0, SIZE), program)


def test_lanes_that_store_over_each_other_are_refused():
    out = torch.zeros(64, dtype=torch.int32)
    _overlapping[(1,)](out, 8, SIZE=8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="lanes of one store"):
        _overlapping[(1,)](out, 7, SIZE=8)


def test_programs_that_store_over_each_other_are_refused():
    out = torch.zeros(64, dtype=torch.int32)
    _same_place[(4,)](out, SIZE=8, APART=8)
    _same_place[(1,)](out, SIZE=8, APART=0)
    with pytest.raises(AssertionError, match="programs"):
        _same_place[(4,)](out, SIZE=8, APART=7)
