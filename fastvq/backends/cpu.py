"""C++ kernels for CPUs (placeholder while the extension is written)."""

def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    return "the CPU extension is not written yet"
