"""Where the rows of a tensor lie, in a kernel; fastvq.backends.rows has the host's part."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastvq.backends.rows import Rows, rows_of

__all__ = ["Rows", "row_offsets", "rows_of"]


@triton.jit
def row_offsets(rows: tl.tensor, inner: tl.tensor, outer: tl.tensor, step: tl.tensor) -> Any:
    """Where int64 `rows` start, in elements."""
    return (rows // inner) * outer + (rows % inner) * step
