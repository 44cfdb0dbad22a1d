"""The token file (.fvq): the codes of images, bit-packed, with all that is needed to restore them.

Layout, little-endian:

    8   magic, b"\\x89FVQ\\r\\n\\x1a\\n" (as PNG's, it shows a transfer that changed line ends)
    2   version, 1
    1   channels of the images
    1   bits a code, ceil(log2(codebook size))
    4   codebook size
    4   number of images
    16  fingerprint of the model
    8   an image: its height and width in pixels, then rows and columns of its codes, 16 bits each
    ... the codes of all images in order, row by row, without gaps; zeros fill the last byte
    4   CRC-32 of everything before it
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvq.data.atomic import write_bytes
from fastvq.data.bits import bit_width, pack, packed_length, unpack
from fastvq.data.errors import UserError

MAGIC = b"\x89FVQ\r\n\x1a\n"
VERSION = 1
LARGEST_SIDE = 0xFFFF

_HEADER = struct.Struct("<8sHBBII16s")
_IMAGE = struct.Struct("<HHHH")
_CRC = struct.Struct("<I")


class TokenFileError(UserError):
    """A token file that is damaged, truncated, foreign, or of another model."""


@dataclass(frozen=True)
class TokenFile:
    """The codes of images and where they come from.

    Attributes:
        codes: (h, w) int64 an image.
        sizes: height and width of each image in pixels; at most 65,535.
        channels: 1 or 3.
        codebook_size: K; every code is below it.
        fingerprint: 16 bytes, of the model that encoded.
    """

    codes: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]]
    channels: int
    codebook_size: int
    fingerprint: bytes

    def to_bytes(self) -> bytes:
        """The content of the file.

        Raises:
            ValueError: an image is too large for the format, or a code is not below `codebook_size`.
        """
        if any(side > LARGEST_SIDE for size in self.sizes for side in size):
            raise ValueError(f"sizes must be at most {LARGEST_SIDE} pixels a side")
        flat = np.concatenate([np.zeros(0, np.int64), *(codes.cpu().numpy().ravel() for codes in self.codes)])
        if flat.size and int(flat.max()) >= self.codebook_size:
            raise ValueError(f"codes must be below {self.codebook_size}; got {int(flat.max())}")
        bits = bit_width(self.codebook_size)
        header = _HEADER.pack(
            MAGIC, VERSION, self.channels, bits, self.codebook_size, len(self.codes), self.fingerprint
        )
        table = [_IMAGE.pack(*size, *codes.shape) for size, codes in zip(self.sizes, self.codes, strict=True)]
        content = header + b"".join(table) + pack(flat, bits)
        return content + _CRC.pack(zlib.crc32(content))

    @classmethod
    def from_bytes(cls, content: bytes) -> TokenFile:
        """The tokens that `to_bytes` wrote.

        Raises:
            TokenFileError: the content is no token file, of another version, truncated or damaged.
        """
        if not content.startswith(MAGIC):
            raise TokenFileError("is not a .fvq file")
        if len(content) < _HEADER.size + _CRC.size:
            raise TokenFileError("is truncated")
        _, version, channels, bits, codebook_size, count, fingerprint = _HEADER.unpack_from(content)
        body = content[: -_CRC.size]
        # The checksum speaks first: without it a damaged number would pass for a strange one.
        if zlib.crc32(body) != _CRC.unpack_from(content, len(body))[0]:
            raise TokenFileError("is damaged or truncated: its checksum does not match")
        if version != VERSION:
            raise TokenFileError(f"has version {version}; this fastvq reads version {VERSION}")
        start = _HEADER.size + count * _IMAGE.size
        if codebook_size == 0 or bits != bit_width(codebook_size) or channels not in (1, 3) or start > len(body):
            raise TokenFileError("is damaged: its header contradicts itself")
        table = [_IMAGE.unpack_from(body, _HEADER.size + i * _IMAGE.size) for i in range(count)]
        if any(0 in image for image in table):
            raise TokenFileError("is damaged: it holds an image without pixels")
        grids = [(rows, columns) for _, _, rows, columns in table]
        total = sum(rows * columns for rows, columns in grids)
        if len(body) - start != packed_length(total, bits):
            raise TokenFileError("is damaged: it does not hold as many codes as it says")
        flat = torch.from_numpy(unpack(body[start:], total, bits))
        if total and int(flat.max()) >= codebook_size:
            raise TokenFileError(f"is damaged: it holds a code that is not below {codebook_size}")
        parts = torch.split(flat, [rows * columns for rows, columns in grids])
        return cls(
            codes=[part.view(grid) for part, grid in zip(parts, grids, strict=True)],
            sizes=[(height, width) for height, width, _, _ in table],
            channels=channels,
            codebook_size=codebook_size,
            fingerprint=fingerprint,
        )

    def write(self, path: Path) -> int:
        """Write the file atomically; returns its size in bytes.

        Raises:
            ValueError: as in `to_bytes`.
        """
        content = self.to_bytes()
        write_bytes(path, content)
        return len(content)

    @classmethod
    def read(cls, path: Path, fingerprint: bytes, factor: int) -> TokenFile:
        """Read a file written for one model, that of `fingerprint`, with one code every `factor` pixels.

        Raises:
            TokenFileError: the file is missing, damaged, foreign, or of another model.
        """
        try:
            tokens = cls.from_bytes(path.read_bytes())
        except OSError as error:
            raise TokenFileError(f"token file {path} cannot be read: {error.strerror}") from error
        except TokenFileError as error:
            raise TokenFileError(f"token file {path} {error}") from error
        if tokens.fingerprint != fingerprint:
            raise TokenFileError(
                f"token file {path} was written by another model: its fingerprint is {tokens.fingerprint.hex()}, "
                f"this run's {fingerprint.hex()}"
            )
        for (height, width), codes in zip(tokens.sizes, tokens.codes, strict=True):
            if tuple(codes.shape) != (-(-height // factor), -(-width // factor)):
                raise TokenFileError(f"token file {path} is damaged: the sizes of an image and its codes disagree")
        return tokens
