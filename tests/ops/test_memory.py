"""No N x K matrix: the memory of search and of the training step, measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="this system tells no peak memory")

# The high-water mark of the resident set is set back just before the call; "extra" is what the call needs beyond its
# inputs and its results, which are alive when it is read. Every block is mapped by itself, so freed means given back.
MEASURE = """
import json
import sys
import torch
import fastvq
from fastvq.measure.memory import status_kib

def work(operation, n, k, d):
    x = torch.randn(n, d).requires_grad_()
    codebook, size = torch.randn(k, d), torch.ones(k)
    average, grad = codebook.clone(), torch.ones(n, d)

    def search():
        return [fastvq.search(x, codebook, backend="cpu")]

    def step():
        quantized, indices, loss = fastvq.vector_quantize(x, codebook, backend="cpu")
        (grad_x,) = torch.autograd.grad([quantized, loss], [x], [grad, torch.ones(())])
        counts, sums = fastvq.code_sums(x, indices, k, backend="cpu")
        fastvq.ema_update_(codebook, size, average, counts, sums, decay=0.99, backend="cpu")
        return [quantized, indices, loss, grad_x, counts, sums]

    def naive():
        return [torch.cdist(x.detach(), codebook).argmin(1)]

    def layer():
        vq = fastvq.VectorQuantize(d, k, **json.loads(operation))
        quantized, indices, loss = vq(x.unsqueeze(0))
        (quantized.sum() + loss.sum()).backward()
        return [quantized, indices, x.grad]

    return {"search": search, "step": step, "naive": naive}.get(operation, layer)

operation, n, k, d = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1 if operation.startswith("{") else 2)
work(operation, 100, 100, d)()
call = work(operation, n, k, d)
before = status_kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
results = call()
peak = status_kib("VmHWM")
print((peak - before) * 1024 - sum(t.nbytes for t in results))
"""


def extra_mib(operation, n, k, d, mapped=1 << 16):
    """What a call needs; blocks of `mapped` bytes are mapped by themselves, which costs time where there are many."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, operation, str(n), str(k), str(d)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(mapped), "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout) / 2**20


def test_the_measure_sees_an_n_by_k_matrix():
    assert 0.9 < extra_mib("naive", 4096, 8192, 8) / 128 < 3


@pytest.mark.parametrize("operation", ["search", "step"])
def test_extra_memory_is_under_64_mib_and_does_not_grow_with_n_times_k(operation):
    quarter = extra_mib(operation, 32768, 32768, 64)
    whole = extra_mib(operation, 65536, 65536, 64)
    assert whole < 64, f"{whole:.1f} MiB"
    # Four times N x K: at most twice, as N or K alone would have it, and a little for threads and pages.
    assert whole < 2 * quarter + 4, f"{quarter:.1f} MiB, then {whole:.1f} MiB"


LAYERS = {
    "cross entropy": {"commitment_use_cross_entropy_loss": True},
    "cosine cross entropy": {"commitment_use_cross_entropy_loss": True, "use_cosine_sim": True},
    "diversity": {"codebook_diversity_loss_weight": 0.1},
    "gumbel": {"stochastic_sample_codes": True, "straight_through": True, "rotation_trick": False},
    "orthogonal": {"orthogonal_reg_weight": 0.1},
    "k-means": {"kmeans_init": True, "kmeans_iters": 1, "threshold_ema_dead_code": 2},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_of_the_layer_holds_no_n_by_k_matrix(name):
    """One would be 128 MiB, and the peer holds six.

    Blocks of logits are 1 MiB, so each is mapped by itself: with a higher threshold they are cut from the heap, which
    keeps what is freed among them, up to twice of what is in use here.
    """
    extra = extra_mib(json.dumps(LAYERS[name]), 4096, 8192, 16, mapped=1 << 19)
    assert extra < 32, f"{extra:.1f} MiB"  # 3 to 15
