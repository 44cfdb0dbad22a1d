"""What a VQ-VAE is made of, and the configurations that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class VQVAEConfig:
    """The shape of a VQ-VAE and the policy of its codebook.

    Attributes:
        in_channels: 1 (grey) or 3 (RGB).
        hidden: channels after each stride-2 convolution; each entry halves height and width.
        kernel: window of the strided convolutions, 4 as in the paper or 3.
        residual_blocks: residual blocks after the last strided convolution, and before the first transposed one.
        residual_channels: channels inside a residual block.
        output_convolution: end with a 3 x 3 convolution at full size; without it the last transposed convolution
            gives the image itself, as in the paper.
        code_dim: D, the dimension of a code.
        codebook_size: K, the number of codes.
        decay: weight of the past in the codebook's moving averages, from 0 to 1.
        commitment_weight: beta of the paper's equation 3.
        threshold_ema_dead_code: a code that fewer rows a batch than this choose (averaged) is replaced by a row of
            the batch; 0 replaces none.
        kmeans_init: start the codebook from k-means over the first batch.
        data_variance: variance of the pixels, in squared units of the [0, 1] range; the reconstruction error is
            divided by it, so that it weighs the same against the commitment loss on any data.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    in_channels: int = 3
    hidden: tuple[int, ...] = (32, 64)
    kernel: int = 4
    residual_blocks: int = 2
    residual_channels: int = 32
    output_convolution: bool = False
    code_dim: int = 64
    codebook_size: int = 512
    decay: float = 0.99
    commitment_weight: float = 0.25
    threshold_ema_dead_code: int = 2
    kmeans_init: bool = True
    data_variance: float = 0.06

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        _require(self.in_channels in (1, 3), "in_channels", self.in_channels, "1 or 3")
        _require(len(self.hidden) >= 1 and min(self.hidden) >= 1, "hidden", self.hidden, "one or more positive numbers")
        _require(self.kernel in (3, 4), "kernel", self.kernel, "3 or 4")
        _require(self.residual_blocks >= 0, "residual_blocks", self.residual_blocks, "at least 0")
        for name in ("residual_channels", "code_dim", "codebook_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0.0 <= self.decay <= 1.0, "decay", self.decay, "from 0 to 1")
        for name in ("commitment_weight", "threshold_ema_dead_code"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.data_variance > 0.0, "data_variance", self.data_variance, "above 0")

    @property
    def factor(self) -> int:
        """Pixels along a side that one code stands for."""
        return 2 ** len(self.hidden)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self) | {"hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VQVAEConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: a field is unknown, missing or out of its range.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"a VQVAEConfig has the fields {sorted(names)}; got {sorted(values)}")
        return cls(**values)


def _require(holds: bool, name: str, value: object, need: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {need}; got {value}")


CONFIGS: dict[str, VQVAEConfig] = {
    # The VQ-VAE example of the Keras documentation, layer for layer: 19,856 + 1,024 + 28,033 parameters.
    "seed": VQVAEConfig(
        in_channels=1,
        hidden=(32, 64),
        kernel=3,
        residual_blocks=0,
        output_convolution=True,
        code_dim=16,
        codebook_size=64,
        data_variance=0.095,
    ),
    "digits": VQVAEConfig(in_channels=1, code_dim=16, codebook_size=128, data_variance=0.095),
    "photos": VQVAEConfig(),
}
