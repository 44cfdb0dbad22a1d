"""moshi: the codebooks of its Mimi codec, and their residual stages."""

from __future__ import annotations

from itertools import islice
from typing import Any, cast

from torch import Tensor, nn

from fastvq.functional import search
from fastvq.interop.patching import Client, FastModule, by_path
from fastvq.interop.residual import fixed_codes, one_call, stages_in_turn


class FastCodebook(FastModule):
    """The nearest code by fastvq.search."""

    def _quantize(self, x: Tensor) -> Tensor:
        return cast(Tensor, search(x, cast(Any, self).embedding))


class FastResidualQuantizer(FastModule):
    """All stages in one call of fastvq.residual_quantize; in training one by one, as they learn."""

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        """Codes (Q, B, T) of latents (B, D, T)."""
        stages = list(islice(cast(nn.ModuleList, self.layers), n_q or None))
        codebooks = [c for c in map(self._codes, stages) if c is not None]
        if len(codebooks) == len(stages) and one_call(x, codebooks):
            return fixed_codes(self, x, codebooks)
        return stages_in_turn(stages, x)

    def _codes(self, stage: nn.Module) -> Tensor | None:
        """The codes of a stage that is what the client makes, and has no projections."""
        if type(stage) is not self.used_classes[0]:
            return None
        client = cast(Any, stage)
        plain = isinstance(client.project_in, nn.Identity) and isinstance(client.project_out, nn.Identity)
        known = plain and isinstance(client._codebook, FastCodebook)
        return cast(Tensor, client._codebook.embedding) if known else None


CLIENTS = by_path(
    [
        Client("moshi.quantization.core_vq.EuclideanCodebook", FastCodebook, ("f774515934e58028",)),
        Client(
            "moshi.quantization.core_vq.ResidualVectorQuantization",
            FastResidualQuantizer,
            ("8e3920443df76fcb",),
            ("VectorQuantization", "EuclideanCodebook"),
        ),
    ]
)
