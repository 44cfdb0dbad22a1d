"""Modules of packages whose `__init__` imports what the tests do not have: found where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from types import ModuleType

import pytest


def import_alone(path: str) -> ModuleType:
    """Import a module without running the `__init__` of the packages that it lies in; skip where it is missing."""
    packages = path.split(".")[:-1]
    if importlib.util.find_spec(packages[0]) is None:
        pytest.skip(f"{packages[0]} is not installed (see tests/interop/no-deps.txt)")
    for depth in range(1, len(packages) + 1):
        name = ".".join(packages[:depth])
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[name] = package
    return importlib.import_module(path)
