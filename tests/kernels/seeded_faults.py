"""Kernels that the gate must find fault with; run by test_ahead_of_time.py in a process without the interpreter."""

import json

import torch
import triton
import triton.language as tl

from benchmarks.ahead_of_time import specialise
from benchmarks.kernel_gate import faults


@triton.jit
def product_kernel(x, y, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    row, column, dim = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DIM)
    a = tl.load(x + row[:, None] * DIM + dim[None, :])
    b = tl.load(y + column[None, :] * DIM + dim[:, None])
    dots = tl.dot(a, b, input_precision="ieee")
    tl.store(out + row[:, None] * COLUMNS + column[None, :], dots - tl.max(dots))  # all are alive until the last


def found(arch, dtype, rows, columns, dim):
    """The faults of a product of that size by one warp group."""
    x, y = (torch.empty(1 << 16, dtype=dtype, device="meta") for _ in range(2))
    out = torch.empty(1 << 16, device="meta")
    options = {"ROWS": rows, "COLUMNS": columns, "DIM": dim, "num_warps": 4, "num_stages": 1}
    return faults([specialise(arch, product_kernel, x, y, out, **options)])[0]


@triton.jit
def atomic_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out + at % 2, tl.load(x + at))


def found_in_atomics(arch, dtype):
    """The faults of sums whose order is left to chance."""
    x, out = (torch.empty(64, dtype=dtype, device="meta") for _ in range(2))
    return faults([specialise(arch, atomic_kernel, x, out, BLOCK=64, num_warps=1)])[0]


CASES = {
    "sound": ("sm_90", torch.float16, 64, 64, 64),
    "float32 needs no tensor instruction": ("sm_90", torch.float32, 16, 16, 16),
    "too few rows for a warp group": ("sm_90", torch.float16, 16, 64, 64),
    "too many registers": ("sm_80", torch.float16, 256, 256, 64),
    "too many registers on AMD": ("gfx942", torch.float16, 512, 256, 32),
    "too much shared memory": ("sm_120", torch.float16, 128, 128, 512),
}

if __name__ == "__main__":
    results = {name: found(*case) for name, case in CASES.items()}
    results["atomics"] = [found_in_atomics(arch, torch.float32) for arch in ("sm_90", "gfx942")]
    results["atomics of integers"] = [found_in_atomics(arch, torch.int32) for arch in ("sm_90", "gfx942")]
    print(json.dumps(results))
