"""Peak memory of a call. Linux only: the kernel's high-water mark of the resident set can be set back there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")


def measurable() -> bool:
    """Whether this system tells."""
    return _RESET.exists()


def status_kib(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_mib(call: Callable[[], object]) -> float:
    """How far one call, its results included, raises the resident set above where it stood before, in MiB.

    True only where freed memory goes back to the system at once (`worker.RETURN_MEMORY`).
    """
    before = status_kib("VmRSS")
    _RESET.write_text("5")
    result = call()
    peak = status_kib("VmHWM")
    del result
    return max(0, peak - before) / 1024
