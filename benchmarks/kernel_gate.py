"""`python -m benchmarks.kernel_gate`: compile what the operators can launch for every device, and look at the code.

The launches are those of a sweep over shapes, dtypes, strides and options, taken from the host code itself. By default
a part of them is compiled, in which every launch configuration of every kernel comes up on every device, aligned and
not, and beside it every pair of dtypes and flags; with --all, every one. Faults: spilled registers, more shared memory
than the device has, a matrix product without a tensor instruction.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from fastvq.kernels import launch

from benchmarks import kernel_report
from benchmarks.ahead_of_time import Launch, batches, compiled, launches_of, operator_calls
from benchmarks.sass import Listing, listings_of, spills_of, tensor_instructions

DIMS = (1, 3, 8, 16, 31, 32, 64, 100, 128, 256, 300, 512, 1024)
SIZES = ((1, 1), (100, 1000), (4096, 1024), (65_536, 8192), (10_000_000, 65_536), (100_000, 1 << 20))
FEW_DIMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 1024)  # for each tile that the heuristics choose
FEW_SIZES = ((100, 1000), (10_000_000, 65_536))
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


def calls(few: bool) -> Iterator[Callable[[], Any]]:
    """A call of every operator for each shape and pair of dtypes; strides and options take turns."""
    turns = itertools.cycle(itertools.product(("euclidean", "cosine"), (False, True), range(3)))
    dims, sizes = (FEW_DIMS, FEW_SIZES) if few else (DIMS, SIZES)
    for d, (n, k), (x_dtype, code_dtype) in itertools.product(dims, sizes, DTYPES):
        metric, option, layout = next(turns)
        x, codebook = list(layouts(n, d, x_dtype))[layout], torch.empty(k, d, dtype=code_dtype, device="meta")
        yield from operator_calls(x, codebook, metric, option)


def sweep(arches: Iterable[str], few: bool) -> list[Launch]:
    """Every launch of the sweep, and each on pointers and sizes that nothing is known of."""
    found = [what for arch in arches for call in calls(few) for what in launches_of(arch, call)]
    return list(dict.fromkeys([*found, *(what.without_divisibility() for what in found)]))


PAST = 257  # stands for all widths past 256, which only tell how often a loop runs
TILE = ("ROWS", "COLUMNS", "STEPS", "STAGES", "CHUNK", "GROUP", "BLOCK", "LEVELS", "num_warps", "num_stages")
NUMBERS = ("D", "BITS", "SLACK", "PARTS", "PART", "SIZE", "WIDTH")  # that only stand in the code, beside the tile


def configuration(what: Launch) -> tuple[Any, ...]:
    """The kernel, its tile, warps and stages, and whether it may count on alignment."""
    constants = what.named_constants | dict(what.options)
    tile = [(name, constants[name]) for name in TILE if name in constants]
    if what.kernel.__name__ in ("screen_kernel", "stages_kernel"):
        tile.append(("WIDTH", min(constants["WIDTH"], PAST)))
    return (what.kernel.__name__, *tile, bool(what.attributes))


def features(what: Launch) -> set[tuple[Any, ...]]:
    """What a launch brings into a selection: its configuration, and its dtypes and flags, one by one and in pairs."""
    flags = [(name, value) for name, value in what.named_constants.items() if name not in (*TILE, *NUMBERS)]
    flags += [(name, kind) for name, kind in what.signature if kind.startswith("*")]
    machine = launch.DEVICES[what.arch].backend
    pairs = {(machine, what.kernel.__name__, *pair) for pair in itertools.combinations(flags, 2)}
    return pairs | {(what.arch, what.kernel.__name__, flag) for flag in flags} | {(what.arch, configuration(what))}


def covering(launches: Iterable[Launch], given: Iterable[Launch] = ()) -> list[Launch]:
    """A small selection that has all features but those of the given; each next launch is the one that brings most."""
    wanted = {what: features(what) for what in launches}
    missing = set().union(*wanted.values()).difference(*map(features, given))
    waiting = [(-len(brought), place, what) for place, (what, brought) in enumerate(wanted.items())]
    heapq.heapify(waiting)
    chosen = []
    while missing:
        _, place, what = heapq.heappop(waiting)
        brings = len(wanted[what] & missing)
        if waiting and brings < -waiting[0][0]:  # less than when it was looked at last: others may bring more
            heapq.heappush(waiting, (-brings, place, what))
            continue
        chosen.append(what)
        missing -= wanted[what]
    return chosen


def part(arches: Iterable[str]) -> list[Launch]:
    """What is compiled by default: the launches of the report, and what brings the features that they lack."""
    reported = list(dict.fromkeys(what for _, _, what in kernel_report.launches(arches, with_rival=False)))
    return reported + covering(sweep(arches, few=True), reported)


FLOAT_ATOMIC = re.compile(
    r"\b(?:atom|red)\.[\w.:]*\.b?f\d+\S*|\b(?:global|flat|ds|buffer)_(?:atomic_)?(?:pk_)?add\w*_b?f\d+"
)


def faults_of(kernel: Any, listing: Listing, arch: str) -> list[str]:
    """What is wrong with a compiled launch; empty when nothing is."""
    found = []
    spills = spills_of(listing)
    if spills:
        found.append(f"{spills} instructions touch local memory")
    room = launch.DEVICES[arch].shared_memory
    if kernel.metadata.shared > room:
        found.append(f"{kernel.metadata.shared} bytes of shared memory, the device has {room}")
    products = re.search(r"tt\.dot .* : tensor<[\dx]*(f16|bf16|i8)>", kernel.asm["ttir"])
    if products and TENSOR[arch] not in tensor_instructions(listing):
        found.append(f"a product of {products[1]} without {TENSOR[arch]}")
    atomic = FLOAT_ATOMIC.search(kernel.asm["amdgcn" if arch.startswith("gfx") else "ptx"])
    if atomic:
        found.append(f"a float atomic: {atomic[0]}")
    return found


def faults(launches: list[Launch]) -> list[list[str]]:
    """What is wrong with each of some launches for one architecture; what does not compile says why."""
    found: list[list[str]] = [[] for _ in launches]
    kernels = {}
    for place, what in enumerate(launches):
        try:
            kernels[place] = compiled(what)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found[place] = [f"does not compile: {type(error).__name__}: {lines[-1]}"]
    if kernels:
        arch = launches[0].arch
        for place, listing in zip(kernels, listings_of(list(kernels.values()), arch), strict=True):
            found[place] = faults_of(kernels[place], listing, arch)
    return found


_work: list[list[Launch]] = []  # what the processes of the pool share by fork: a kernel cannot be pickled


def _examine(place: int) -> tuple[int, list[list[str]]]:
    return place, faults(_work[place])


def main() -> int:
    """Compile, print the faults, and return how many launches have one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every launch of the sweep, not a covering part: hours")
    parser.add_argument("--arch", choices=list(launch.DEVICES), action="append", help="default: all")
    parser.add_argument("--kernel", help="only kernels with this in their name")
    parser.add_argument("--list", action="store_true", help="print the launches and compile nothing")
    options = parser.parse_args()
    arches = options.arch or list(launch.DEVICES)
    chosen = sweep(arches, few=False) if options.all else part(arches)
    if options.kernel:
        chosen = [what for what in chosen if options.kernel in what.kernel.__name__]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    _work.extend(batches(chosen))
    wrong = 0
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for place, found in pool.imap_unordered(_examine, range(len(_work))):
            for what, reasons in zip(_work[place], found, strict=True):
                if reasons:
                    wrong += 1
                    print(f"{what}:\n    " + "\n    ".join(reasons), flush=True)
    print(f"{len(chosen)} launches compiled, {wrong} with faults")
    return min(wrong, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
