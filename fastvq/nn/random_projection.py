"""The random-projection quantiser of BEST-RQ (Chiu et al., 2022, arXiv:2202.01855): targets for self-supervision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq.nn import checks
from fastvq.nn.channels import channels_last
from fastvq.nn.vector_quantize import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """Project tokens by frozen random matrices, and give the index of the nearest random unit code of each.

    Takes the place of `vector_quantize_pytorch.RandomProjectionQuantizer` 1.32.0: the same arguments, defaults and
    returns. There, several codebooks are searched behind further linear layers, which are trainable and of
    codebook_dim^2 * num_codebooks^3 weights each; here codes have codebook_dim channels, as in the paper.

    Args:
        dim: channels of the input.
        codebook_size: codes of each codebook.
        codebook_dim: channels of a code.
        num_codebooks: projections, and codebooks.
        norm: normalise each token to mean 0 and variance 1 first (section 3 of the paper).
        strict_compat: the layers, results and state_dict of vector-quantize-pytorch, which differ with several
            codebooks; its checkpoints load then.
        kwargs: further arguments of `VectorQuantize`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, out of range, or that does not go with another.
    """

    rand_projs: Tensor

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        strict_compat: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        checks.whole("dim", dim, 1)
        checks.whole("codebook_dim", codebook_dim, 1)
        checks.whole("num_codebooks", num_codebooks, 1)
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            codebook_dim * num_codebooks,
            codebook_size,
            codebook_dim=None if strict_compat else codebook_dim,
            heads=num_codebooks,
            use_cosine_sim=True,
            separate_codebook_per_head=True,
            strict_compat=strict_compat,
            **kwargs,
        ).eval()

    def train(self, mode: bool = True) -> RandomProjectionQuantizer:
        """Set the mode of this module; its quantiser stays in eval mode, since nothing here learns."""
        super().train(mode)
        self.vq.eval()
        return self

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """The indices of x, or the loss against some.

        Args:
            x: (B, N, dim), or (B, dim) for one token each. Any floating dtype.
            indices: (B, N), or (B, N, num_codebooks) with several codebooks; int64, -1 for tokens without a target.

        Returns:
            Indices (B, N), or (B, N, num_codebooks) with several codebooks, int64; with indices, the cross entropy of
            the cosines to them, ().

        Raises:
            TypeError, ValueError: x is no tensor, or dim is not where it should be.
        """
        rows = self.norm(channels_last("x", x, self.dim, False))
        projected = torch.einsum("...d,hde->...he", rows, self.rand_projs.to(rows.dtype)).flatten(-2)
        found = self.vq(projected, indices=indices)
        result: Tensor = found[1]
        return result
