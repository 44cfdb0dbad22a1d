"""What the operators compile, as JSON; run by test_ahead_of_time.py in a process without the interpreter."""

import json

import torch
from fastvq.kernels import launch

from benchmarks.ahead_of_time import launches_of, operator_calls
from benchmarks.kernel_gate import configuration, part

BATCHES = (2, 3, 16, 100, 1000, 4096, 65_537, 1_000_000, 10_000_000)


def by_batch_size(k, d, option):
    """Kernel: how many times it is compiled for one batch size, and for all of them."""
    counts = {}
    of_all = {}
    for n in BATCHES:
        x, codebook = (torch.empty(rows, d, dtype=torch.bfloat16, device="meta") for rows in (n, k))
        of_one = {}
        for call in operator_calls(x, codebook, "euclidean", option):
            for what in launches_of("sm_90", call):
                of_one.setdefault(what.kernel.__name__, set()).add(what)
        for kernel, found in of_one.items():
            of_all.setdefault(kernel, set()).update(found)
            counts[kernel] = max(counts.get(kernel, 0), len(found))
    return {kernel: (counts[kernel], len(found)) for kernel, found in of_all.items()}


def chosen_tiles():
    """Device: the configurations of the launches that the gate compiles."""
    found = {arch: [] for arch in launch.DEVICES}
    for what in part(launch.DEVICES):
        found[what.arch].append(configuration(what))
    return found


if __name__ == "__main__":
    batches = [by_batch_size(k, d, option) for k, d in ((1000, 64), (65_536, 20)) for option in (False, True)]
    print(json.dumps({"batches": batches, "chosen": chosen_tiles()}))
