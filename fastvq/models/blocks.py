"""The convolutional halves of a VQ-VAE: images to latents, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.models.config import VQVAEConfig


class ResidualBlock(nn.Module):
    """ReLU, 3 x 3, ReLU, 1 x 1, added to the input (van den Oord et al., 2017, section 4.1)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


class Halve(nn.Conv2d):
    """A stride-2 convolution to exactly half the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W even, to (B, C', H / 2, W / 2)."""
        # A window of 3 pads the end alone, as "same" does in Keras; a window of 4 pads both sides.
        start = (self.kernel_size[0] - 2) // 2
        return super().forward(F.pad(x, (start, 1, start, 1)))


class Double(nn.ConvTranspose2d):
    """A stride-2 transposed convolution to exactly twice the size: `Halve` backwards."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H, W) to (B, C', 2 H, 2 W)."""
        start = (self.kernel_size[0] - 2) // 2
        return super().forward(x)[..., start : start + 2 * x.shape[-2], start : start + 2 * x.shape[-1]]


class Encoder(nn.Sequential):
    """Centred images (B, C, H, W) to latents (B, D, H / factor, W / factor)."""

    def __init__(self, config: VQVAEConfig) -> None:
        layers: list[nn.Module] = []
        width = config.in_channels
        for hidden in config.hidden:
            layers += [Halve(width, hidden, config.kernel), nn.ReLU()]
            width = hidden
        if config.residual_blocks:
            layers += [nn.Conv2d(width, width, 3, padding=1), *_residual_stack(config)]
        super().__init__(*layers, nn.Conv2d(width, config.code_dim, 1))


class Decoder(nn.Sequential):
    """Quantised latents (B, D, h, w) to centred images (B, C, h * factor, w * factor)."""

    def __init__(self, config: VQVAEConfig) -> None:
        layers: list[nn.Module] = []
        width = config.code_dim
        if config.residual_blocks:
            layers += [nn.Conv2d(width, config.hidden[-1], 3, padding=1), *_residual_stack(config)]
            width = config.hidden[-1]
        widths = [*reversed(config.hidden)]
        if not config.output_convolution:
            widths = [*widths[1:], config.in_channels]
        for hidden in widths:
            layers += [Double(width, hidden, config.kernel), nn.ReLU()]
            width = hidden
        # Nothing follows the layer that gives the image.
        last = nn.Conv2d(width, config.in_channels, 3, padding=1) if config.output_convolution else None
        super().__init__(*layers, last) if last is not None else super().__init__(*layers[:-1])


def _residual_stack(config: VQVAEConfig) -> list[nn.Module]:
    blocks = [ResidualBlock(config.hidden[-1], config.residual_channels) for _ in range(config.residual_blocks)]
    return [*blocks, nn.ReLU()]
