"""Tensors that lie flush against a page that may not be touched: an access out of bounds is a fault, not a guess.

With FASTVQ_TEST_DEVICE=cuda they lie on the GPU, between poison: what is read out of bounds is NaN or out of range.
"""

import ctypes
import mmap
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = os.environ.get("FASTVQ_TEST_DEVICE", "cpu")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
_EMPTY = {torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty}
_EMPTY |= {torch.ops.aten.new_empty_strided}


def _forbid(address, size):
    if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")


def _between_guards(size, dtype, side):
    """A poisoned tensor of `size` elements whose last ("end") or first ("start") byte is next to a forbidden page."""
    page, step = mmap.PAGESIZE, dtype.itemsize
    room = -(-max(size * step, 1) // page) * page
    if DEVICE != "cpu":
        memory = poison(torch.empty((room + 2 * page) // step, dtype=dtype, device=DEVICE))
        first = (page + (room - size * step if side == "end" else 0)) // step
        return memory[first : first + size]
    pages = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    _forbid(start, page)
    _forbid(start + page + room, page)
    if size == 0:
        return torch.empty(0, dtype=dtype)
    offset = page + (room - size * step if side == "end" else 0)
    memory = torch.frombuffer(pages, dtype=torch.uint8, count=size * step, offset=offset)  # keeps `pages` alive
    return poison(memory.view(dtype))


def poison(t):
    """Fill with what no kernel may read: NaN, or the largest integer."""
    if t.dtype.is_floating_point:
        return t.fill_(torch.nan)
    return t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)


def guarded(t, side="end"):
    """A copy of `t`, its strides too, that ends (or starts) where touching memory is fatal; poison between strides."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = _between_guards(span, t.dtype, side)
    start = memory.storage_offset()
    copy = torch.empty(0, dtype=t.dtype, device=memory.device)
    copy = copy.set_(memory.untyped_storage(), start, t.shape, t.stride())
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())  # an expanded dimension
    copy[once].copy_(t[once])
    return copy


def on_device(*tensors):
    """The tensors where the kernels under test run."""
    return tuple(None if t is None else t.to(DEVICE) for t in tensors)


class GuardedAllocations(TorchDispatchMode):
    """Inside the block every tensor that torch makes lies between guards, and an empty one is poisoned."""

    def __init__(self, side="end"):
        super().__init__()
        self.side = side
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        fresh = [r.alias_info is None for r in function._schema.returns]
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len(fresh) != len(results):  # a list of tensors is one return
            return result
        poisoned = function.overloadpacket in _EMPTY
        guards = tuple(
            self._guard(r, poisoned) if new and isinstance(r, torch.Tensor) and r.device.type == DEVICE else r
            for r, new in zip(results, fresh, strict=True)
        )
        return guards if isinstance(result, (tuple, list)) else guards[0]

    def _guard(self, t, poisoned):
        self.made += 1
        return guarded(poison(t) if poisoned and t.numel() else t, self.side)
