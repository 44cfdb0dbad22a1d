"""What a GPU shows and the interpreter cannot: real tiles, streams, graphs, large offsets, whole modules.

`make gpu-check` runs these on the device (FASTVQ_TEST_DEVICE=cuda), every backend that it has; without one they run in
the interpreter as far as that goes, on few rows.
"""

import contextlib

import pytest
import torch
import torch._dynamo
from compare import assert_no_less_exact, assert_same_bits, assert_same_indices
from families import DTYPES, FAMILIES, make
from guard import DEVICE, GuardedAllocations, guarded, on_device

import fastvq
from fastvq.backends import cuda, reference, triton

ON_GPU = DEVICE != "cpu"
BACKENDS = {"triton": triton} | ({"cuda": cuda} if ON_GPU and cuda.missing() is None else {})
SHAPES = ((1023, 777, 31), (257, 4099, 64), (64, 1000, 252), (300, 129, 5), (130, 300, 300), (1, 20_001, 128))
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.fixture(params=BACKENDS)
def engine(request):
    """A backend that computes where the tests run."""
    return BACKENDS[request.param]


@contextlib.contextmanager
def no_host_sync():
    """Waiting for the device is an error in the block."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def example(n=10_000, k=1024, d=64, dtype="float32"):
    n, k, d = (n, k, d) if ON_GPU else (40, 30, 8)
    return make("gaussian", n, k, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES if ON_GPU else ["near_tied"])
def test_every_index_on_real_tiles(engine, family, dtype):
    for n, k, d in SHAPES if ON_GPU else ((20, 33, 7),):
        x, codebook = make(family, n, k, d, dtype, seed=d)
        for metric in ("euclidean", "dot"):
            wanted, distances = reference.search(x, codebook, metric, True, "exact")
            mine = guarded(x), guarded(codebook)
            with GuardedAllocations():
                found = engine.search(*mine, metric, True, "exact")
            assert_same_indices(found[0], wanted, f"{metric} {n} {k} {d}")
            assert_same_bits(found[1], distances, f"{metric} {n} {k} {d}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_and_its_gradients(engine, dtype):
    x, codebook = example(5000, 200, 48, dtype)
    mask = torch.rand(len(x)) < 0.9
    wanted = reference.vector_quantize_counted(x, codebook, "euclidean", 0.25, 0.7, mask)
    tensors = on_device(x, codebook, mask)
    with no_host_sync():
        found = engine.vector_quantize_counted(*tensors[:2], "euclidean", 0.25, 0.7, tensors[2])
    assert_same_bits(found[0], wanted[0])
    assert found[3].tolist() == wanted[3].tolist()
    assert_same_indices(found[1], wanted[1])
    torch.testing.assert_close(found[2].cpu(), wanted[2], rtol=1e-6, atol=0)
    upstream, one = torch.randn(x.shape).to(x.dtype), torch.ones((), dtype=wanted[2].dtype)
    arguments = upstream, one, x, codebook, wanted[1], mask, 0.25, 0.7, True, True
    gradients = reference.vector_quantize_backward(*arguments)
    mine = on_device(*arguments[:6])
    with no_host_sync():
        found = engine.vector_quantize_backward(*mine, *arguments[6:])
    assert_same_bits(found[0], gradients[0])
    assert_no_less_exact(found[1], gradients[1], gradients[1].double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_updates_and_stages(engine, dtype):
    x, codebook = example(5000, 1000, 40, dtype)
    indices = torch.randint(len(codebook), (len(x),))
    wanted = reference.code_sums(x, indices, len(codebook), None, False)
    mine = on_device(x, indices)
    with no_host_sync():
        found = engine.code_sums(*mine, len(codebook), None, False)
    for a, b in zip(found, wanted, strict=True):
        assert_same_bits(a, b)
    state = [t.to(wanted[1].dtype) for t in (codebook, wanted[0] + 1, codebook * 3, *wanted)]
    mine = on_device(*state)
    reference.ema_update_(*state, 0.75, 1e-5)
    with no_host_sync():
        engine.ema_update_(*mine, 0.75, 1e-5)
    for a, b in zip(mine, state, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=4 * torch.finfo(b.dtype).eps, atol=0)
    codebooks = torch.stack([codebook, codebook.roll(1, 1) * 0.5, codebook.roll(2, 1) * 0.25])
    quantized, stages, losses = reference.residual_quantize(x, codebooks, "euclidean")
    mine = on_device(x, codebooks)
    with no_host_sync():
        found = engine.residual_quantize(*mine, "euclidean")
    assert_same_indices(found[1], stages)
    assert_same_bits(found[0], quantized)
    torch.testing.assert_close(found[2].cpu(), losses, rtol=1e-6, atol=0)


def test_a_row_is_the_same_alone_and_in_a_batch(engine):
    x, codebook = on_device(*example(4096, 8192, 32, "bfloat16"))
    whole = engine.search(x, codebook, "euclidean", False, "exact")[0]
    for n in (1, 2, 17, 300):
        assert torch.equal(engine.search(x[:n], codebook, "euclidean", False, "exact")[0], whole[:n])


@only_on_gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_a_training_step_in_a_graph_on_a_stream_of_its_own(name):
    """Search, layer, sums and update captured once, replayed on other rows: what an eager run computes."""
    x, codebook = on_device(*example())
    start = codebook.clone(), torch.ones(len(codebook), device=DEVICE), codebook.clone()
    state = [t.clone() for t in start]

    def step():
        quantized, indices, loss = fastvq.vector_quantize(x, state[0], backend=name)
        counts, sums = fastvq.code_sums(x, indices, len(codebook), backend=name)
        fastvq.ema_update_(*state, counts, sums, decay=0.9, backend=name)
        return quantized, indices, loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    for mine, first in zip(state, start, strict=True):
        mine.copy_(first)
    graph.replay()
    replayed = [t.clone() for t in (*captured, *state)]
    for mine, first in zip(state, start, strict=True):
        mine.copy_(first)
    for found, wanted in zip(replayed, (*step(), *state), strict=True):
        assert_same_bits(found, wanted)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs a GPU and the CUDA extension")
@pytest.mark.parametrize(
    ("heads", "n", "k"), [(1, 1000, 9), (1, 300_001, 255), (33, 20_000, 1024), (3, 70_000, 1 << 20)]
)
def test_rows_are_sorted_by_code(heads, n, k):
    """A tile, one pass of CUB's radix sort, and three of several heads: torch's stable sort of each."""
    indices, mask = torch.randint(-1, k, (heads, n, 1), device=DEVICE), torch.rand(heads, n, device=DEVICE) < 0.9
    codes, order = torch.where(mask & (indices[..., 0] >= 0), indices[..., 0], k).sort(dim=1, stable=True)
    with no_host_sync():
        found = cuda._rows_by_code(indices, mask, k, checked=True)
    above = torch.arange(heads, device=DEVICE).unsqueeze(1) << k.bit_length()
    assert torch.equal(found.keys.long(), codes + above)
    assert torch.equal(found.order.long(), order)
    assert torch.equal(
        found.starts, torch.searchsorted(codes, torch.arange(k + 1, device=DEVICE).expand(heads, -1).contiguous())
    )


@only_on_gpu
def test_offsets_past_two_to_the_31(engine):
    """2^25 + 100 rows of 64 bfloat16 numbers: the last rows lie past 2^31 elements."""
    n = (1 << 25) + 100
    x = torch.zeros(n, 64, dtype=torch.bfloat16, device=DEVICE)
    x[-1000:] = torch.randn(1000, 64)
    codebook = torch.randn(100, 64, dtype=torch.bfloat16)
    wanted, _ = reference.search(x[-1000:].cpu(), codebook, "euclidean", False, "exact")
    quantized, indices, _ = engine.vector_quantize(x, codebook.to(DEVICE), "euclidean", 1.0, 0.0, None)
    assert_same_indices(indices[-1000:], wanted)
    assert_same_bits(quantized[-1000:], codebook[wanted])
    _, sums = engine.code_sums(x[-1000:], indices[-1000:], 100, None, False)
    _, all_sums = engine.code_sums(x, indices, 100, None, False)
    torch.testing.assert_close(all_sums, sums, rtol=1e-5, atol=1e-5)


@only_on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_modules_learn_as_on_the_cpu(compiled):
    """Three training steps of the layer: the indices and the codebook of the CPU, also compiled whole."""
    torch._dynamo.reset()
    layers = [fastvq.VectorQuantize(dim=32, codebook_size=64, decay=0.8) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].to(DEVICE)
    call = torch.compile(layers[1], fullgraph=True) if compiled else layers[1]
    for step in range(3):
        x = torch.randn(4, 100, 32, generator=torch.Generator().manual_seed(step))
        here, there = x.clone().requires_grad_(), x.to(DEVICE).requires_grad_()
        quantized, indices, loss = layers[0](here)
        found = call(there)
        (quantized.sum() + loss.sum()).backward()
        (found[0].sum() + found[2].sum()).backward()
        assert_same_indices(found[1], indices)
        torch.testing.assert_close(found[0].cpu(), quantized, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-5, atol=1e-6)
    for mine, wanted in zip(layers[1].state_dict().values(), layers[0].state_dict().values(), strict=True):
        torch.testing.assert_close(mine.cpu(), wanted, rtol=1e-5, atol=1e-6)


@only_on_gpu
def test_warmup_compiles_what_a_step_needs():
    layer = fastvq.ResidualVQ(dim=64, codebook_size=128, num_quantizers=4).to(DEVICE)
    fastvq.warmup(layer, (2, 50, 64))
    x = torch.randn(2, 50, 64, device=DEVICE, requires_grad=True)
    with no_host_sync():
        quantized, _, losses = layer(x)
        (quantized.sum() + losses.sum()).backward()
