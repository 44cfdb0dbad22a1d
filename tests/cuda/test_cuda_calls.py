"""What every call of the CUDA backend keeps to: the stream and the device of its tensors, offsets of 64 bits."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same_bits, assert_same_indices
from shimmed import dies

from fastvq.backends import cuda, reference


def results(backend, x, codebook):
    """What the five operators and the gradients make of rows, one head."""
    found = backend.vector_quantize_counted(x, codebook, "euclidean", 0.25, 0.5, None)
    indices = found[1]
    upstream, one = torch.ones_like(x), torch.tensor(1.0)
    gradients = backend.vector_quantize_backward(upstream, one, x, codebook, indices, None, 0.25, 0.5, True, True)
    counts, sums = backend.code_sums(x, indices, len(codebook), None, False)
    state = [codebook.float(), counts + 1, codebook.float() * 2]
    backend.ema_update_(*state, counts, sums, 0.5, 1e-5)
    books = torch.stack([codebook, codebook * 0.5])
    stages = backend.residual_quantize(x, books, "euclidean")
    back = backend.residual_quantize_backward(upstream, torch.ones(2), x, books, stages[1], True, True)
    return [*found, *gradients, counts, sums, *state, *stages, *back]


@pytest.fixture
def stream(shim_module, monkeypatch):
    """A stream of the caller's; a launch on another one ends the program."""
    allow = ctypes.CDLL(shim_module.__file__).fastvq_shim_stream
    allow.argtypes = [ctypes.c_size_t]
    allow(4096)
    monkeypatch.setattr(cuda, "_stream", lambda _: 4096)
    yield
    allow(0)


@pytest.mark.parametrize(("n", "k", "d"), [(40, 30, 8), (5, 300, 40), (300, 30, 300)])
def test_every_kernel_of_a_call_is_queued_on_its_stream(n, k, d, kernels, stream, way):
    results(cuda, torch.randn(n, d), torch.randn(k, d))
    results(cuda, torch.randn(n, d).double(), torch.randn(k, d).double())


def test_a_launch_on_another_stream_is_seen(kernels):
    code = "import torch; cuda._stream = lambda _: 4096; cuda.gather(torch.ones(1, 1), torch.ones(1, 1), "
    assert "another stream" in dies(kernels, code + "torch.zeros(1, dtype=torch.int64), 1.0, None)")


def test_a_call_is_made_on_the_device_and_stream_of_its_tensor(monkeypatch):
    """And the device that was current is so again, whatever happens."""
    seen = []
    there = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))

    @contextlib.contextmanager
    def device_of(t):
        seen.append(("enter", t.device.index))
        try:
            yield
        finally:
            seen.append(("leave",))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=700 + device.index))
    monkeypatch.setattr(cuda, "_kernels", SimpleNamespace(set_device=lambda index: seen.append(("set", index))))
    cuda._call(lambda *arguments: seen.append(arguments), there, 5, 6)
    assert seen == [("enter", 1), ("set", 1), (5, 6, 701), ("leave",)]
    with pytest.raises(ZeroDivisionError):
        cuda._call(lambda *_: 1 // 0, there)
    assert seen[-1] == ("leave",)


@pytest.mark.parametrize("strides", [(1 << 30, 1), (1, 1 << 30)], ids=["rows", "elements"])
def test_offsets_past_32_bits(kernels, strides, way):
    """Rows, or the elements of a row, 2^30 apart in memory that nobody touches: 4 GiB of it, and 3 pages."""
    apart = torch.empty((1 << 31) + 64, dtype=torch.float16).as_strided((3, 3), strides)
    apart.copy_(torch.randn(3, 3))
    codebook = torch.randn(5, 3, dtype=torch.float16)
    for mine, right in zip(results(cuda, apart, codebook), results(reference, apart.clone(), codebook), strict=True):
        if right.dtype == torch.int64:
            assert_same_indices(mine, right)
        else:
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)
    assert_same_bits(cuda.gather(apart, codebook, torch.tensor([4, 0, 2]), 1.0, None)[0], codebook[[4, 0, 2]])
