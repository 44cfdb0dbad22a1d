"""`python -m benchmarks.kernel_gate`: compile what the operators can launch for every device, and look at the code.

The launches are those of a sweep over shapes, dtypes, strides and options, taken from the host code itself. By default
a part of them is compiled, in which every value of a constant and every dtype of an argument comes up for each
kernel and device; with --all, every one. Faults: spilled registers, more shared memory than the device has, a matrix
product without a tensor instruction.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastvq.kernels import launch

from benchmarks.ahead_of_time import Launch, compiled, launches_of, operator_calls
from benchmarks.sass import listing_of, spills_of, tensor_instructions

DIMS = (1, 3, 8, 16, 31, 32, 64, 100, 128, 256, 300, 512, 1024)
SIZES = ((1, 1), (100, 1000), (4096, 1024), (65_536, 8192), (10_000_000, 65_536), (100_000, 1 << 20))
DTYPES = (
    *[(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)],
    (torch.bfloat16, torch.float32),
)
TENSOR = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}


def layouts(n: int, d: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Rows (n, d) as they come: side by side, off every boundary, and with the dimensions far apart."""
    yield torch.empty(n, d, dtype=dtype, device="meta")
    yield torch.empty(n * d + 1, dtype=dtype, device="meta")[1:].view(n, d)
    yield torch.empty(1, d, n, dtype=dtype, device="meta").transpose(1, 2)


def calls() -> Iterator[Callable[[], Any]]:
    """A call of every operator for each shape and pair of dtypes; strides and options take turns."""
    turns = itertools.cycle(itertools.product(("euclidean", "cosine"), (False, True), range(3)))
    for d, (n, k), (x_dtype, code_dtype) in itertools.product(DIMS, SIZES, DTYPES):
        metric, option, layout = next(turns)
        x, codebook = list(layouts(n, d, x_dtype))[layout], torch.empty(k, d, dtype=code_dtype, device="meta")
        yield from operator_calls(x, codebook, metric, option)


def features(what: Launch) -> set[tuple[Any, ...]]:
    """What a launch brings into a selection; not the constants that are but a number in the code."""
    constants = [(name, value) for name, value in what.named_constants.items() if name not in ("D", "BITS", "SLACK")]
    types = [(name, kind) for name, kind in what.signature if kind.startswith("*")]
    others = [*types, *what.options, ("aligned", bool(what.attributes))]
    return {(what.arch, what.kernel.__name__, *pair) for pair in (*constants, *others)}


def covering(launches: list[Launch]) -> list[Launch]:
    """A small selection that has all features; each next launch is the one that brings most."""
    wanted = {what: features(what) for what in launches}
    missing = set().union(*wanted.values())
    chosen = []
    while missing:
        best = max(wanted, key=lambda what: len(wanted[what] & missing))
        chosen.append(best)
        missing -= wanted.pop(best)
    return chosen


def faults(what: Launch) -> list[str]:
    """What is wrong with a compiled launch; empty when nothing is."""
    kernel = compiled(what)
    listing = listing_of(kernel)
    found = []
    spills = spills_of(listing)
    if spills:
        found.append(f"{spills} instructions touch local memory")
    room = launch.DEVICES[what.arch].shared_memory
    if kernel.metadata.shared > room:
        found.append(f"{kernel.metadata.shared} bytes of shared memory, the device has {room}")
    products = re.search(r"tt\.dot .* : tensor<[\dx]*(f16|bf16|i8)>", kernel.asm["ttir"])
    if products and TENSOR[what.arch] not in tensor_instructions(listing):
        found.append(f"a product of {products[1]} without {TENSOR[what.arch]}")
    return found


def _examine(what: Launch) -> tuple[Launch, list[str], float]:
    start = time.perf_counter()
    try:
        found = faults(what)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        found = [f"does not compile: {type(error).__name__}: {lines[-1]}"]
    return what, found, time.perf_counter() - start


_work: list[Launch] = []  # what the processes of the pool share by fork: a kernel cannot be pickled


def _examine_at(place: int) -> tuple[int, list[str], float]:
    _, found, took = _examine(_work[place])
    return place, found, took


def main() -> int:
    """Compile, print the faults, and return how many launches have one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every launch of the sweep, not a covering part: hours")
    parser.add_argument("--arch", choices=list(launch.DEVICES), action="append", help="default: all")
    parser.add_argument("--kernel", help="only kernels with this in their name")
    parser.add_argument("--list", action="store_true", help="print the launches and compile nothing")
    options = parser.parse_args()
    for arch in options.arch or launch.DEVICES:
        found: dict[Launch, None] = {}
        for call in calls():
            for what in launches_of(arch, call):
                if options.kernel is None or options.kernel in what.kernel.__name__:
                    found[what] = None
        everything = [*found, *(what.without_divisibility() for what in found)]
        everything = list(dict.fromkeys(everything))
        chosen = everything if options.all else covering(everything)
        print(f"{arch}: {len(chosen)} of {len(everything)} launches", flush=True)
        _work.extend(chosen)
    if options.list:
        print(*_work, sep="\n")
        return 0
    wrong, seconds = 0, Counter[str]()
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for place, found, took in pool.imap_unordered(_examine_at, range(len(_work))):
            seconds[_work[place].kernel.__name__] += took
            if found:
                wrong += 1
                print(f"{_work[place]}:\n    " + "\n    ".join(found), flush=True)
    for name, total in seconds.most_common():
        print(f"{name}: {sum(what.kernel.__name__ == name for what in _work)} launches, {total:.0f} s")
    print(f"{len(_work)} launches compiled, {wrong} with faults")
    return min(wrong, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
