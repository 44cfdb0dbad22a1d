"""Backend "cuda" as users meet it, on CPU tensors: operators with gradients, a layer's training step, errors."""

import pytest
import torch
from compare import assert_same_bits, assert_same_indices
from families import make

import fastvq
from fastvq.backends import cuda, select


@pytest.fixture(autouse=True)
def _serves_the_cpu(kernels, monkeypatch):
    monkeypatch.setattr(select, "missing", lambda name: None)
    monkeypatch.setattr(select, "serves", lambda name, device_type: True)


def gradients(backend):
    """Values and gradients of the differentiable operators."""
    torch.manual_seed(1)
    x, codebook = (t.requires_grad_() for t in make("gaussian", 60, 40, 8))
    quantized, indices, loss = fastvq.vector_quantize(x, codebook, codebook_weight=0.5, backend=backend)
    codebooks = torch.stack([codebook, 0.3 * codebook])
    summed, stages, losses = fastvq.residual_quantize(x, codebooks, backend=backend)
    (quantized.square().sum() + loss + summed.sin().sum() + losses.sum()).backward()
    return quantized, indices, loss, summed, stages, losses, x.grad, codebook.grad


def test_operators_and_their_gradients():
    for found, wanted in zip(gradients("cuda"), gradients("reference"), strict=True):
        if wanted.dtype == torch.int64:
            assert_same_indices(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_training_steps_of_the_layer():
    def train(backend):
        torch.manual_seed(2)
        layer = fastvq.VectorQuantize(dim=8, codebook_size=30, decay=0.9)
        with fastvq.use_backend(backend):
            for _ in range(3):
                x = torch.randn(2, 50, 8, requires_grad=True)
                quantized, indices, loss = layer(x)
                (quantized.square().mean() + loss.sum()).backward()
        return layer._codebook.embed, indices, x.grad

    found, wanted = train("cuda"), train("reference")
    assert_same_indices(found[1], wanted[1])
    for mine, right in zip(found[::2], wanted[::2], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)


def test_a_launch_that_fails_names_the_operator():
    x, codebook = torch.randn(70_000, 1, 1), torch.randn(70_000, 1, 1)
    indices = torch.zeros(70_000, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="fastvq CUDA operator vector_quantize: invalid configuration argument"):
        cuda.gather(x, codebook, indices, 1.0, None)
    codebooks, stages = torch.randn(4000, 1, 1), torch.zeros(1, 4000, dtype=torch.int64)  # too much shared memory
    with pytest.raises(RuntimeError, match="fastvq CUDA operator residual_quantize: invalid argument"):
        cuda.gather_stages(x[0], codebooks, stages)


def test_nothing_changes_with_the_order_of_warps(seed):
    x, codebook = make("near_tied", 100, 64, 16, "bfloat16")
    quantized, indices, _ = fastvq.vector_quantize(x, codebook, backend="cuda")
    wanted = fastvq.vector_quantize(x, codebook, backend="reference")
    assert_same_indices(indices, wanted[1])
    assert_same_bits(quantized, wanted[0])
