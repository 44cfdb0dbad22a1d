"""Triton kernels: not there yet; asking for them says so."""


def missing() -> str | None:
    """Why this backend cannot serve, or None."""
    return "fastvq has no Triton kernels yet"
