"""In place of vector-quantize-pytorch: `import fastvq.compat.vector_quantize_pytorch as vector_quantize_pytorch`.

It has every name that version 1.32.0 of the package exports; docs/compat.md tells what differs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import fastvq

_CLASSES = (
    *("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "RandomProjectionQuantizer", "FSQ", "FSP", "LFQ", "EvoLFQ"),
    *("ResidualLFQ", "GroupedResidualLFQ", "ResidualFSQ", "GroupedResidualFSQ", "LatentQuantize", "SimVQ"),
    *("ResidualSimVQ", "BinaryMapper", "HierarchicalVQ"),
)
_NOT_IN_SEQUENTIAL = {"BinaryMapper", "EvoLFQ"}  # no layers from x to quantized, there nor here

__all__ = [*_CLASSES, "Sequential"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(fastvq, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor does vector_quantize_pytorch 1.32.0")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class Sequential(nn.Module):
    """Modules in turn, exactly one of them a quantiser, whose further return values come out at the end.

    Args:
        fns: the modules.

    Raises:
        ValueError: there is no quantiser among them, or more than one.
    """

    def __init__(self, *fns: nn.Module) -> None:
        super().__init__()
        classes = tuple(getattr(fastvq, name) for name in __all__ if name not in {"Sequential", *_NOT_IN_SEQUENTIAL})
        places = [place for place, fn in enumerate(fns) if isinstance(fn, classes)]
        if len(places) != 1:
            names = ", ".join(type(fn).__name__ for fn in fns)
            raise ValueError(f"fns must hold exactly one of fastvq's quantisers; got {len(places)} in ({names})")
        self.fns = nn.ModuleList(fns)
        self._place = places[0]

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """x through all modules, the quantiser with `kwargs`: what the last gives, and the quantiser's other values."""
        rest: list[Any] = []
        for place, fn in enumerate(self.fns):
            if place == self._place:
                x, *rest = fn(x, **kwargs)
            else:
                x = fn(x)
        return x, *rest
