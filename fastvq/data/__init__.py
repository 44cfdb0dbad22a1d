"""Images in and out: the built-in data, folders and arrays, batches, and the token file."""

from fastvq.data.batches import CropBatches
from fastvq.data.errors import DataError, UserError
from fastvq.data.images import read_image, write_image
from fastvq.data.sources import Images, load
from fastvq.data.token_file import TokenFile, TokenFileError

__all__ = [
    "CropBatches",
    "DataError",
    "Images",
    "TokenFile",
    "TokenFileError",
    "UserError",
    "load",
    "read_image",
    "write_image",
]
