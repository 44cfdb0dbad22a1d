"""Token files: exact, small, and never believed when they are damaged."""

import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvq.data import TokenFile, TokenFileError
from fastvq.data.token_file import MAGIC

NAME = bytes(range(16))


def tokens(codebook_size: int = 300, grids=((3, 5), (2, 2))) -> TokenFile:
    generator = torch.Generator().manual_seed(0)
    return TokenFile(
        codes=[torch.randint(codebook_size, grid, generator=generator) for grid in grids],
        sizes=[(4 * rows - 1, 4 * columns) for rows, columns in grids],
        channels=3,
        codebook_size=codebook_size,
        fingerprint=NAME,
    )


def same(one: TokenFile, other: TokenFile) -> bool:
    return (
        list(one.sizes) == list(other.sizes)
        and len(one.codes) == len(other.codes)
        and all(torch.equal(a, b) for a, b in zip(one.codes, other.codes, strict=True))
        and (one.channels, one.codebook_size, one.fingerprint)
        == (other.channels, other.codebook_size, other.fingerprint)
    )


@given(
    st.sampled_from([1, 2, 3, 64, 300, 512, 70_000]),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=0, max_size=4),
)
@settings(deadline=None)
def test_what_is_written_is_read(codebook_size, grids):
    before = tokens(codebook_size, grids)
    assert same(TokenFile.from_bytes(before.to_bytes()), before)


def test_the_size_is_that_of_the_layout():
    assert len(tokens().to_bytes()) == 36 + 2 * 8 + -(-19 * 9 // 8) + 4


def test_every_flipped_bit_is_found():
    content = tokens().to_bytes()
    for position in range(len(content)):
        for bit in (1, 16, 128):
            damaged = bytearray(content)
            damaged[position] ^= bit
            with pytest.raises(TokenFileError):
                TokenFile.from_bytes(bytes(damaged))


def test_every_truncation_and_addition_is_found():
    content = tokens().to_bytes()
    for length in range(len(content)):
        with pytest.raises(TokenFileError):
            TokenFile.from_bytes(content[:length])
    with pytest.raises(TokenFileError):
        TokenFile.from_bytes(content + b"\0")


def forged(image: tuple[int, int, int, int] = (4, 4, 1, 1), **fields: int) -> bytes:
    """A file whose checksum is right and whose header is not."""
    header = {"version": 1, "channels": 3, "bits": 9, "codebook_size": 300, "count": 1} | fields
    body = struct.pack("<8sHBBII16s", MAGIC, *header.values(), NAME) + struct.pack("<HHHH", *image) + b"\xff\xff"
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a .fvq file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a .fvq file"),
        (MAGIC + bytes(3), "truncated"),
        (forged(version=2), "version 2"),
        (forged(channels=2), "contradicts"),
        (forged(bits=8), "contradicts"),
        (forged(codebook_size=0), "contradicts"),
        (forged(count=9), "contradicts"),
        (forged(count=0), "as many codes"),
        (forged(image=(4, 0, 1, 0)), "an image without pixels"),
        (forged(image=(8, 4, 2, 1)), "as many codes"),
        (forged(), "not below 300"),
    ],
)
def test_foreign_and_forged_files_are_refused(content, words):
    with pytest.raises(TokenFileError, match=words):
        TokenFile.from_bytes(content)


def test_read_names_the_file_and_the_problem(tmp_path):
    path = tmp_path / "a.fvq"
    with pytest.raises(TokenFileError, match=r"a\.fvq cannot be read: No such file"):
        TokenFile.read(path, NAME, 4)
    tokens().write(path)
    assert same(TokenFile.read(path, NAME, 4), tokens())
    with pytest.raises(TokenFileError, match="written by another model"):
        TokenFile.read(path, bytes(16), 4)
    with pytest.raises(TokenFileError, match="sizes of an image and its codes disagree"):
        TokenFile.read(path, NAME, 8)
    path.write_bytes(b"hello")
    with pytest.raises(TokenFileError, match=r"a\.fvq is not a .fvq file"):
        TokenFile.read(path, NAME, 4)


def test_what_does_not_fit_the_format_is_refused(tmp_path):
    large = TokenFile([torch.zeros(1, 1, dtype=torch.int64)], [(65_536, 1)], 1, 2, NAME)
    wrong = TokenFile([torch.full((1, 1), 300)], [(4, 4)], 1, 300, NAME)
    for bad, words in ((large, "at most 65535"), (wrong, "below 300")):
        with pytest.raises(ValueError, match=words):
            bad.write(tmp_path / "a.fvq")
    assert not list(tmp_path.iterdir())
