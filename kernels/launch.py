"""How a kernel is started: the device as a launch sees it, and the one function that every launch goes through."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """What a launch configuration may depend on; configurations are pure functions of it and the shapes."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: str  # "sm_90", "gfx942"; "" for the interpreter
    shared_memory: int  # bytes a block may use
    multiprocessors: int
    warp_size: int


# The devices that every kernel is compiled for ahead of time; figures from the vendors' tuning guides.
DEVICES = {
    "sm_80": Device("cuda", "sm_80", 166_912, 108, 32),
    "sm_90": Device("cuda", "sm_90", 232_448, 132, 32),
    "sm_100": Device("cuda", "sm_100", 232_448, 148, 32),
    "sm_120": Device("cuda", "sm_120", 101_376, 188, 32),
    "gfx942": Device("hip", "gfx942", 65_536, 304, 64),
}
INTERPRETER = Device("interpreter", "", 232_448, 2, 32)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors; it reads the variable at its import."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@functools.cache
def _device(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 65_536))
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Device("hip", arch, 65_536, properties.multi_processor_count, properties.warp_size)
    arch = f"sm_{properties.major}{properties.minor}"
    return Device("cuda", arch, shared, properties.multi_processor_count, 32)


_taken: ContextVar[tuple[Device, Callable[..., None]] | None] = ContextVar("fastvq_launches", default=None)


@contextlib.contextmanager
def taken_by(take: Callable[..., None], device: Device) -> Iterator[None]:
    """Inside the block host code runs as on `device`, and `take` gets what `launch` would have been given.

    With meta tensors this tells what a call launches without computing anything: a host sync is an error there.
    """
    token = _taken.set((device, take))
    try:
        yield
    finally:
        _taken.reset(token)


def device_of(t: Tensor) -> Device:
    """The device that serves a tensor."""
    taken = _taken.get()
    if taken is not None:
        return taken[0]
    return INTERPRETER if t.device.type == "cpu" else _device(t.device.index)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first argument, on its current stream: every launch passes here.

    `arguments` are the runtime ones in order, a tensor first; `options` the constexprs by name, num_warps and
    num_stages. Without fused multiply-add unless a kernel asks for it by `tl.fma`: the contract rounds each operation
    on its own.
    """
    options["enable_fp_fusion"] = False
    taken = _taken.get()
    if taken is not None:
        taken[1](kernel, grid, *arguments, **options)
    else:
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, whatever the pointers say
            kernel[grid](*arguments, **options)
