"""Where a command's images go, settled before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvq.data import UserError


def outputs_in(folder: Path, stems: Sequence[str], inputs: Sequence[Path]) -> list[Path]:
    """One PNG a stem in `folder`, none of them an input, no two the same.

    Raises:
        UserError: `folder` is a file, two images would get one name, or an input would be written over.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"-o {folder} is not a folder")
    paths = [folder / f"{stem}.png" for stem in stems]
    taken = {path.resolve() for path in inputs}
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise UserError(f"two images would both be written to {path}")
        if path.resolve() in taken:
            raise UserError(f"{path} would be written over its original; choose another folder")
        if path.is_dir():
            raise UserError(f"{path} is a folder")
    return paths
