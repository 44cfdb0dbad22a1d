"""Bit packing: whatever goes in comes out, in as few bytes as can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvq.data import bits as module
from fastvq.data.bits import bit_width, pack, packed_length, unpack


@pytest.mark.parametrize(
    ("size", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (512, 9), (513, 10), (65536, 16), (65537, 17)]
)
def test_bit_width_is_the_logarithm_rounded_up(size, bits):
    assert bit_width(size) == bits


@given(st.data())
@settings(deadline=None)
def test_unpack_undoes_pack(data):
    bits = data.draw(st.integers(0, 32))
    numbers = np.array(data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=70)), np.int64)
    packed = pack(numbers, bits)
    assert len(packed) == packed_length(len(numbers), bits) == -(-len(numbers) * bits // 8)
    assert unpack(packed, len(numbers), bits).tolist() == numbers.tolist()
    # The specification: the numbers in binary, one after the other, zeros at the end.
    text = "".join(format(n, f"0{bits}b") for n in numbers.tolist()) if bits else ""
    assert packed == int(text.ljust(8 * len(packed), "0") or "0", 2).to_bytes(len(packed), "big")


@pytest.mark.parametrize("bits", [1, 7, 9, 10, 13])
@pytest.mark.parametrize("count", [63, 64, 65, 128, 1000])
def test_chunks_meet_without_a_seam(monkeypatch, bits, count):
    numbers = np.random.default_rng(0).integers(0, 1 << bits, count)
    whole = pack(numbers, bits)
    monkeypatch.setattr(module, "_CHUNK", 64)
    assert pack(numbers, bits) == whole
    assert np.array_equal(unpack(whole, count, bits), numbers)


@pytest.mark.parametrize("number", [-1, 8])
def test_a_number_that_does_not_fit_is_refused(number):
    with pytest.raises(ValueError, match="from 0 to 7 for 3 bits"):
        pack(np.array([1, number]), 3)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_packed_of_the_wrong_length_is_refused(length):
    with pytest.raises(ValueError, match="packed must be 3 bytes"):
        unpack(bytes(length), 8, 3)
