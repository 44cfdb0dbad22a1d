"""Whole numbers of a few bits each, packed without gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 16  # numbers a step; a multiple of 8, so that every chunk ends on a whole byte


def bit_width(size: int) -> int:
    """ceil(log2(size)): the bits that a number from 0 to size - 1 needs; none where there is but one."""
    return (size - 1).bit_length()


def packed_length(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(numbers: NDArray[np.int64], bits: int) -> bytes:
    """Pack (N,) numbers from 0 to 2**bits - 1, most significant bit first; the last byte is filled with zeros.

    Raises:
        ValueError: a number does not fit into `bits`.
    """
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << bits:
        raise ValueError(f"numbers must be from 0 to {(1 << bits) - 1} for {bits} bits")
    shifts = np.arange(bits - 1, -1, -1)
    chunks = (numbers[start : start + _CHUNK] for start in range(0, numbers.size, _CHUNK))
    return b"".join(np.packbits(((chunk[:, None] >> shifts) & 1).astype(np.uint8)).tobytes() for chunk in chunks)


def unpack(packed: bytes, count: int, bits: int) -> NDArray[np.int64]:
    """The (count,) numbers that `pack` packed.

    Raises:
        ValueError: `packed` has another length than that many numbers take.
    """
    if len(packed) != packed_length(count, bits):
        raise ValueError(f"packed must be {packed_length(count, bits)} bytes; got {len(packed)}")
    numbers = np.zeros(count, np.int64)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    stored = np.frombuffer(packed, np.uint8)
    for start in range(0, count, _CHUNK):
        n = min(_CHUNK, count - start)
        window = stored[start * bits // 8 : packed_length(start + n, bits)]
        numbers[start : start + n] = np.unpackbits(window, count=n * bits).reshape(n, bits) @ weights
    return numbers
