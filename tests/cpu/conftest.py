"""Programs are built once a session."""

from collections.abc import Callable
from pathlib import Path

import programs
import pytest


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """program(variant, name), see `programs.build`."""
    folders: dict[str, Path] = {}

    def build(variant: str, name: str) -> Path:
        if variant not in folders:
            folders[variant] = tmp_path_factory.mktemp(variant)
        return programs.build(variant, name, folders[variant])

    return build
