"""encodec: the codebooks of its codec, and their residual stages, as its repository has them under the MIT licence.

The release 0.1.1 is under CC-BY-NC. Its codebook is, to the letter, the one that is under MIT since, and so is known;
its residual stages are not, and are left alone.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, cast

from torch import Tensor, nn

from fastvq.functional import search
from fastvq.interop.patching import Client, FastModule, by_path, fast_class
from fastvq.interop.residual import one_call, stacked_codes, stages_in_turn


class FastCodebook(FastModule):
    """The nearest code by fastvq.search."""

    def quantize(self, x: Tensor) -> Tensor:
        """Indices (N,) of the codes nearest to rows (N, D)."""
        return cast(Tensor, search(x, cast(Any, self).embed))


class FastResidualQuantizer(FastModule):
    """All stages in one call of fastvq.residual_quantize; in training one by one, as they learn."""

    codes = "embed"  # the attribute of a codebook that holds them

    def encode(self, x: Tensor, n_q: int | None = None) -> Tensor:
        """Codes (Q, B, T) of latents (B, D, T)."""
        stages = list(islice(cast(nn.ModuleList, self.layers), n_q or None))
        codebooks = [c for c in map(self._codes, stages) if c is not None]
        if len(codebooks) == len(stages) and one_call(x, codebooks):
            return self._at_once(x, codebooks)
        return stages_in_turn(stages, x)

    def _at_once(self, x: Tensor, codebooks: list[Tensor]) -> Tensor:
        return stacked_codes(self, x, codebooks)

    def _codes(self, stage: nn.Module) -> Tensor | None:
        """The codes of a stage that is what the client makes, has channels second and no projections."""
        if type(stage) is not self.used_classes[0]:
            return None
        client = cast(Any, stage)
        plain = isinstance(client.project_in, nn.Identity) and isinstance(client.project_out, nn.Identity)
        second = not getattr(client, "channels_last", False)
        known = plain and second and type(client._codebook) is fast_class(cast(Any, self.used_classes[1]))
        return cast(Tensor, getattr(client._codebook, self.codes)) if known else None


def clients(package: str, codebook: tuple[str, ...], stages: tuple[str, ...]) -> dict[str, Client]:
    """Those of a package with these classes, by the digests of its codebook and of its residual stages."""
    path, uses = f"{package}.quantization.core_vq", ("VectorQuantization", "EuclideanCodebook")
    return by_path(
        [
            Client(f"{path}.EuclideanCodebook", FastCodebook, codebook),
            Client(f"{path}.ResidualVectorQuantization", FastResidualQuantizer, stages, uses),
        ]
    )


CLIENTS = clients("encodec", ("2b4d5e2c6218c341",), ("93a7ff22a580c760",))
