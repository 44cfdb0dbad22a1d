"""Threads: torch's and no others, as many as it was told; all operators from several at once, and after a fork."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import make

import fastvq


def everything(x, codebook):
    """What every operator gives, gradients among it."""
    x = x.clone().requires_grad_()
    size, average, codes = torch.ones(codebook.shape[0]), codebook.clone(), codebook.clone()
    indices, distances = fastvq.search(x, codebook, return_distance=True, backend="cpu")
    quantized, found, loss = fastvq.vector_quantize(x, codebook, backend="cpu")
    (grad,) = torch.autograd.grad([quantized.sum(), loss], [x])
    counts, sums = fastvq.code_sums(x, indices, codebook.shape[0], backend="cpu")
    fastvq.ema_update_(codes, size, average, counts, sums, decay=0.9, backend="cpu")
    stages = torch.stack([codebook, codebook / 2])
    residual, stage_indices, losses = fastvq.residual_quantize(x, stages, backend="cpu")
    (stage_grad,) = torch.autograd.grad([residual.sum(), losses.sum()], [x])
    results = indices, distances, quantized, found, loss, grad, counts, sums, codes, size, average
    return *results, residual, stage_indices, losses, stage_grad


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_every_operator_from_four_python_threads_at_once():
    torch.set_num_threads(2)
    jobs = [make(family, 1501, 200 + 10 * i, 16 + i, seed=i) for i, family in enumerate(("gaussian", "offset", "tiny"))]
    wanted = [everything(*job) for job in jobs]
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        return all(same(everything(*job), right) for _ in range(3) for job, right in zip(jobs, wanted, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.timeout(120)
def test_every_operator_after_a_fork():
    torch.set_num_threads(2)
    job = make("gaussian", 1901, 900, 16, seed=1)  # so small that torch's own operators, which would hang, need no team
    wanted = everything(*job)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if same(everything(*job), wanted) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(everything(*job), wanted)


# Prints the process's threads after torch has started its own, and after every operator of fastvq has run; then the CPU
# seconds that operators took in this thread, and in all others.
MEASURE = """
import sys
import time
import torch
import test_threads
from families import make

def threads():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Threads:"))

torch.set_num_threads(int(sys.argv[1]))
leaf = torch.randn(1 << 20, requires_grad=True)
(leaf * 2).relu().sum().backward()
before = threads()
job = make("gaussian", 20011, 1000, 32)
test_threads.everything(*job)
after = threads()
mine, all_ = time.thread_time(), time.process_time()
for _ in range(3):
    test_threads.fastvq.search(*job, backend="cpu")
mine, all_ = time.thread_time() - mine, time.process_time() - all_
print(before, after, mine, all_ - mine)
"""


def measure(number):
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", MEASURE, str(number)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(value) for value in done.stdout.split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system does not tell its threads")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_torchs_threads_and_no_others(number):
    before, after, mine, others = measure(number)
    assert after == before, "fastvq started threads beside torch's"
    if number == 1:
        assert others < 0.05 * mine, "a second thread worked"
    else:
        assert others > 0.05 * mine, "the others did nothing"


@pytest.mark.parametrize(("rows", "size"), [(20000, 7), (50021, 1000), (9000, 9000)])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_many_rows_on_any_number_of_threads(rows, size, masked):
    """Each thread sorts a part of the rows by their codes; the order of the sums is that of the rows."""
    generator = torch.Generator().manual_seed(rows)
    x, indices = torch.randn(rows, 3, generator=generator), torch.randint(-1, size, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator) > 0.3 if masked else None
    wanted = fastvq.code_sums(x, indices, size, mask=mask, backend="reference")
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert same(fastvq.code_sums(x, indices, size, mask=mask, backend="cpu"), wanted)
