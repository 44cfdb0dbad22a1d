"""Whether two searches agree: where their codes differ, rounding must have decided between codes equally near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How the codes of some rows compare."""

    codes: int
    different: int
    unexplained: int  # of these: where float64 tells the codes apart by more than the other's rounding

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.codes + other.codes, self.different + other.different, self.unexplained + other.unexplained
        )


def compare_codes(rows: Tensor, codebook: Tensor, theirs: Tensor, ours: Tensor) -> Agreement:
    """Compare two choices of the nearest code.

    A difference is explained where the squared distances in float64 are no further apart than the rounding of
    |x|^2 - 2 x.c + |c|^2 in the dtype of the rows: a few units in the last place of (|x| + |c|)^2, times the root of
    the number of terms.

    Args:
        rows: (N, D).
        codebook: (K, D).
        theirs: (N,), codes by the arithmetic of that dtype.
        ours: (N,), codes that are to be the nearest.
    """
    places = (theirs != ours).nonzero().flatten()
    wide = rows[places].double()
    their_codes, our_codes = codebook[theirs[places]].double(), codebook[ours[places]].double()
    gap = (wide - their_codes).square().sum(-1) - (wide - our_codes).square().sum(-1)
    largest = torch.maximum(their_codes.norm(dim=-1), our_codes.norm(dim=-1))
    room = torch.finfo(rows.dtype).eps * (8 + 2 * rows.shape[-1] ** 0.5) * (wide.norm(dim=-1) + largest).square()
    unexplained = ((gap < 0) | ~(gap <= room)).sum()
    return Agreement(theirs.numel(), len(places), int(unexplained))


def compare_stages(rows: Tensor, codebooks: Sequence[Tensor], theirs: Tensor, ours: Tensor) -> Agreement:
    """Compare the codes of a residual quantiser, each row up to the first stage where they differ.

    Args:
        rows: (N, D).
        codebooks: Q tensors (K, D).
        theirs, ours: (Q, N).
    """
    total = Agreement(0, 0, 0)
    for stage, codebook in enumerate(codebooks):
        total += compare_codes(rows, codebook, theirs[stage], ours[stage])
        same = (theirs[stage] == ours[stage]).nonzero().flatten()
        rows = (rows - codebook[theirs[stage]])[same]
        theirs, ours = theirs[:, same], ours[:, same]
    return total
