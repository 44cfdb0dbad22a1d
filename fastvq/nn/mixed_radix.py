"""Codes that are numbers of several digits, each with a radix of its own: the first digit counts ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvq.nn import checks


class MixedRadix(nn.Module):
    """What the scalar quantisers share: a code of d digits, digit i from 0 to levels[i] - 1, and its index.

    Attributes:
        codebook_size: the product of the levels.
        codebook_dim: d.
    """

    _levels: Tensor
    _basis: Tensor

    def _set_levels(self, levels: Sequence[int], least: int, hint: str = "") -> None:
        if not isinstance(levels, Sequence) or isinstance(levels, str):
            raise TypeError(f"levels must be a list or tuple of ints; got {type(levels).__name__}")
        if not levels:
            raise ValueError(f"levels must name at least one level; got {levels!r}")
        for level in levels:
            checks.whole("every one of levels", level, 1)
            if level < least:
                raise ValueError(f"levels must be at least {least}{hint}; got {list(levels)}")
        self.codebook_size = math.prod(levels)
        self.codebook_dim = len(levels)
        basis = list(itertools.accumulate(levels[:-1], int.__mul__, initial=1))
        self._index_dtype = torch.int32 if self.codebook_size <= 2**31 else torch.int64
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=self._index_dtype), persistent=False)

    def _digits_to_indices(self, digits: Tensor) -> Tensor:
        """Whole digits (..., d), of any dtype, to indices (...); a NaN counts as 0."""
        whole = digits.nan_to_num(nan=0.0) if digits.is_floating_point() else digits
        return (whole.to(self._index_dtype) * self._basis).sum(-1, dtype=self._index_dtype)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The digits of each index: (...) to (..., d), integers."""
        checks.tensor("indices", indices)
        checks.dtype("indices", indices, (torch.int64, torch.int32))
        return indices.unsqueeze(-1) // self._basis % self._levels
