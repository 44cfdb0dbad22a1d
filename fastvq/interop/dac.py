"""descript-audio-codec: the quantiser of each stage."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastvq.interop.nearest import nearest_direction
from fastvq.interop.patching import Client, FastModule, by_path


class FastVectorQuantize(FastModule):
    """The nearest normalised code by fastvq.search."""

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, D, T) as stored, and their indices (B, T), for latents (B, D, T)."""
        client = cast(Any, self)
        indices = nearest_direction(latents.transpose(1, 2), client.codebook.weight)
        return client.decode_code(indices), indices


CLIENTS = by_path([Client("dac.nn.quantize.VectorQuantize", FastVectorQuantize, ("1a772ccf47b028c2",))])
