"""Compiling ahead of the first step what a module will need."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of a module's output, whatever it is made of."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    return [t for part in result for t in _tensors(part)] if isinstance(result, (list, tuple)) else []


def warmup(module: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype | None = None, **options: Any) -> None:
    """Run a copy of `module` once for each shape, so that its kernels are compiled before they are timed or captured.

    Training and evaluation, forward and backward; the module itself, its gradients and the random state stay as they
    are. The kernels of a GPU depend on D, K, the dtypes, and for large codebooks on the order of magnitude of N: give
    the shapes that will come. With `torch.distributed`, every process must call it, as the copy joins the reductions.

    Args:
        module: a quantiser of fastvq, or a model with some in it; on the device where it will run.
        shapes: of the inputs, at least one.
        dtype: of the inputs; that of the module's first floating-point parameter or buffer by default.
        options: further arguments of the module's forward.

    Raises:
        TypeError: `module` is no module.
        ValueError: no shape was given.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    if not shapes:
        raise ValueError("shapes must name at least one input shape; got none")
    held = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), torch.empty(0))
    devices = [held.device] if held.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        for shape in shapes:
            for training in (True, False):
                copied = copy.deepcopy(module).train(training)
                x = torch.randn(shape, device=held.device, dtype=dtype or held.dtype, requires_grad=True)
                results = [t for t in _tensors(copied(x, **options)) if t.requires_grad]
                if results:
                    torch.autograd.backward([t.sum() for t in results])
