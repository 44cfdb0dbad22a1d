"""moshi: the codebooks of its Mimi codec, and their residual stages."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastvq.functional import search
from fastvq.interop import encodec
from fastvq.interop.patching import Client, FastModule, by_path
from fastvq.interop.residual import fixed_codes


class FastCodebook(FastModule):
    """The nearest code by fastvq.search."""

    def _quantize(self, x: Tensor) -> Tensor:
        return cast(Tensor, search(x, cast(Any, self).embedding))


class FastResidualQuantizer(encodec.FastResidualQuantizer):
    """All stages in one call of fastvq.residual_quantize; in training one by one, as they learn."""

    codes = "embedding"

    def _at_once(self, x: Tensor, codebooks: list[Tensor]) -> Tensor:
        return fixed_codes(self, x, codebooks)


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
