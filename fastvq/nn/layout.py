"""Where a layer's input has its channels, tokens and heads: to rows for the codebooks, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvq.nn import checks


@dataclass(frozen=True)
class Layout:
    """How inputs of `dim` channels lie, and how a token is split among heads.

    Args:
        dim: channels of a token.
        heads: parts of a projected token.
        separate: each head has a codebook of its own.
        channel_last: tokens are (B, N, dim), else (B, dim, N); (B, dim) is one token each under both.
        image: the input is (B, dim, height, width).
        volume: the input is (B, dim, depth, height, width).
    """

    dim: int
    heads: int = 1
    separate: bool = False
    channel_last: bool = True
    image: bool = False
    volume: bool = False

    @property
    def spatial(self) -> bool:
        """Whether the channels come second by the kind of input, however many tokens there are."""
        return self.image or self.volume

    def _channels_second(self, x: Tensor) -> bool:
        return self.spatial or (not self.channel_last and x.dim() > 2)

    def places(self, x: Tensor) -> tuple[int, ...]:
        """The shape of x less its channels: that of the indices of one head."""
        return (*x.shape[:1], *x.shape[2:]) if self._channels_second(x) else tuple(x.shape[:-1])

    def tokens(self, x: Tensor) -> Tensor:
        """The input as (B, N, dim).

        Raises:
            TypeError, ValueError: x is no tensor, or not of this layout.
        """
        checks.tensor("x", x)
        if self.spatial:
            flag, dims, sizes = (
                ("accept_image_fmap", 4, "height, width")
                if self.image
                else ("accept_3d_fmap", 5, "depth, height, width")
            )
            checks.layout("x", x, dims, 1, self.dim, f"(B, dim, {sizes}), as {flag} asks")
            return x.flatten(2).transpose(1, 2)
        if x.dim() == 2:
            checks.layout("x", x, 2, 1, self.dim, "(B, N, dim) or (B, dim)")
            return x.unsqueeze(1)
        if not self.channel_last:
            checks.layout("x", x, 3, 1, self.dim, "(B, dim, N) or (B, dim), as channel_last=False asks")
            return x.transpose(1, 2)
        checks.layout("x", x, 3, 2, self.dim, "(B, N, dim) or (B, dim)")
        return x

    def restored(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens (B, N, ..., dim) laid out as x; what stands between N and dim goes last, before a last dim."""
        if self._channels_second(x):
            return tokens.reshape(*self.places(x), *tokens.shape[2:]).movedim(-1, 1)
        return tokens.squeeze(1) if x.dim() == 2 else tokens

    def mask(self, x: Tensor, tokens: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """Which of the tokens take part, (B, N) bool, or None when all do.

        Raises:
            TypeError, ValueError: mask or lens of the wrong type or shape, both, or one where x has no sequence.
        """
        if mask is None and lens is None:
            return None
        name = "mask" if lens is None else "lens"
        if mask is not None and lens is not None:
            raise ValueError("mask and lens say the same thing: give one of them; got both")
        if x.dim() != 3:
            raise ValueError(f"{name} needs x with a dimension of tokens, of 3 dimensions; got {tuple(x.shape)}")
        if mask is not None:
            checks.tensor("mask", mask)
            checks.dtype("mask", mask, (torch.bool,))
            checks.shape("mask", mask, tokens.shape[:2])
            return mask
        assert lens is not None
        checks.tensor("lens", lens)
        checks.dtype("lens", lens, (torch.int64, torch.int32))
        checks.shape("lens", lens, tokens.shape[:1])
        return torch.arange(tokens.shape[1], device=lens.device) < lens.unsqueeze(1)

    def rows(self, tokens: Tensor) -> Tensor:
        """(B, N, heads * D) as (heads, B, N, D), or, on one codebook, (1, B, N * heads, D)."""
        if self.heads == 1:
            return tokens.unsqueeze(0)
        split = tokens.unflatten(-1, (self.heads, -1))
        return split.permute(2, 0, 1, 3) if self.separate else split.flatten(1, 2).unsqueeze(0)

    def joined(self, rows: Tensor) -> Tensor:
        """What `rows` has split, (B, N, heads * D); a further dimension before D, of one head, stays."""
        if self.separate:
            return rows.movedim(0, -2).flatten(-2) if self.heads > 1 else rows.squeeze(0)
        return rows.squeeze(0).unflatten(1, (-1, self.heads)).flatten(2, 3) if self.heads > 1 else rows.squeeze(0)

    def by_place(self, rows: Tensor) -> Tensor:
        """Rows (H, B, T, ...), T being the places of the sequence: of heads on one codebook (1, B * heads, N, ...)."""
        if self.separate or self.heads == 1:
            return rows
        return rows.unflatten(2, (-1, self.heads)).transpose(2, 3).flatten(1, 2)

    def from_places(self, rows: Tensor) -> Tensor:
        """The inverse of `by_place`."""
        if self.separate or self.heads == 1:
            return rows
        return rows.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(2, 3)
