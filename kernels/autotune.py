"""Launch configurations chosen by timing, only when FASTVQ_AUTOTUNE=1 asks for it; what was found is kept on disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton

from .launch import Device

Choice = TypeVar("Choice", bound="tuple[int, ...]")

_CALLS = 5
_found: dict[str, list[int]] = {}  # of this process


def wanted() -> bool:
    """Whether the user asks for it."""
    return os.environ.get("FASTVQ_AUTOTUNE", "0") in ("1", "true", "on")


def cache_file() -> Path:
    """Where results are kept: FASTVQ_CACHE, or fastvq in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FASTVQ_CACHE") or user / "fastvq") / "autotune.json"


def fastest(device: Device, what: str, choices: Sequence[Choice], run: Callable[[Choice], object]) -> Choice:
    """The choice whose `run` is fastest on the current stream, measured once for a device, Triton and `what`.

    Choices that the device refuses are passed over. While a graph is captured, or where nothing can be timed, it is
    the first one, which is what the heuristics choose.
    """
    if device.backend == "interpreter" or torch.cuda.is_current_stream_capturing():
        return choices[0]
    key = f"{device.arch} x{device.multiprocessors}, triton {triton.__version__}: {what}"
    kept = _found.get(key) or _read().get(key)
    best = next((choice for choice in choices if list(choice) == kept), None)
    if best is None:
        times = timed(choices, run)
        best = min(times, key=lambda choice: times[choice], default=choices[0])
        _write(key, list(best))
    _found[key] = list(best)
    return best


def timed(choices: Sequence[Choice], run: Callable[[Choice], object]) -> dict[Choice, float]:
    """Median milliseconds of each choice that the device takes; it waits for the device."""
    times = {}
    for choice in choices:
        with contextlib.suppress(triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            times[choice] = _milliseconds(lambda choice=choice: run(choice))  # type: ignore[misc]
    return times


def _milliseconds(call: Callable[[], object]) -> float:
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_CALLS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def _read() -> dict[str, list[int]]:
    """What the file holds; nothing where it is missing or damaged."""
    try:
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(key: str, choice: list[int]) -> None:
    """Add a result, beside the file and then in its place; a folder that cannot be written keeps nothing."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_read() | {key: choice}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
            part.write(text + "\n")
        os.replace(part.name, path)
