"""diffusers: the quantiser of its VQModel."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastvq.interop.nearest import quantized_image
from fastvq.interop.patching import Client, FastModule, by_path


class FastVectorQuantizer(FastModule):
    """The nearest code by fastvq.search."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantized (B, C, H, W), the loss, and (None, None, indices): flat, or (B, H, W) with sane_index_shape."""
        client = cast(Any, self)
        tokens = z.permute(0, 2, 3, 1).contiguous()
        weights = (1.0, client.beta) if client.legacy else (client.beta, 1.0)
        quantized, loss, indices = quantized_image(tokens, client.embedding.weight, client.embedding, weights)
        if client.remap is not None:
            indices = client.remap_to_used(indices.view(len(z), -1)).reshape(-1, 1)
        if client.sane_index_shape:
            indices = indices.reshape(tokens.shape[:-1])
        return quantized, loss, (None, None, indices)


CLIENTS = by_path(
    [Client("diffusers.models.autoencoders.vae.VectorQuantizer", FastVectorQuantizer, ("05f72024e9b5285a",))]
)
