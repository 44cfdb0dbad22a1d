"""A folder of images as a sequence, without ever holding more than fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from torch import Tensor

from fastvq.data.images import SUFFIXES, read_image

MEMORY = 1 << 30  # bytes of decoded images that are kept


def image_paths(folder: Path) -> list[Path]:
    """The image files under a folder, by their suffix, sorted; hidden ones are passed over."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


class FolderImages(Sequence[Tensor]):
    """Images decoded once and kept while they fit in memory; the others are decoded at each use.

    Raises:
        DataError: an image among those that fit cannot be read; a later one raises when it is used.
    """

    def __init__(self, paths: Sequence[Path], memory: int = MEMORY) -> None:
        self._paths = list(paths)
        self._kept: list[Tensor] = []
        for path in self._paths:
            image = read_image(path)
            memory -= image.numel()
            if memory < 0:
                break
            self._kept.append(image)
        self.channels = max(image.shape[0] for image in self._kept) if self._kept else 3

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._kept[index] if 0 <= index < len(self._kept) else read_image(self._paths[index])
