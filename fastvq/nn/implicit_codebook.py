"""The network that makes a stage's codebook anew for each token (QINCo: Huijben et al., 2024, arXiv:2401.14732)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional


class ImplicitCodebook(nn.Module):
    """Turns base codes into those that suit what the stages before have made of a token.

    Args:
        dim: D, of codes and conditions.
        dim_hidden: width of the residual blocks; None takes D.
        depth: number of residual blocks.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """The codebooks (H, B, N, K, D) of tokens with the conditions (B, N, D), from codes (H, K, D)."""
        return self.of_codes(codes[:, None, None], condition.unsqueeze(-2))

    def of_codes(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Codes (..., D), each for a condition (..., D); the two shapes broadcast."""
        weight = self.proj_in.weight
        dim = weight.shape[0]
        # The linear layer of the two side by side, each by itself: their product is never laid out at twice the width.
        wide = functional.linear(condition.to(weight.dtype), weight[:, :dim], self.proj_in.bias)
        mixed = wide + functional.linear(codes.to(weight.dtype), weight[:, dim:])
        for layer in self.layers:
            mixed = mixed + cast(Tensor, layer(mixed))
        return mixed
