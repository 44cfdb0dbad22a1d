"""warmup: the kernels are launched, and nothing else is to be seen of it."""

import pytest
import torch
from compare import assert_same_bits
from fastvq.kernels import launch

import fastvq


def test_the_module_and_the_random_state_stay_as_they_are():
    layers = torch.nn.Sequential(torch.nn.Linear(6, 8), fastvq.VectorQuantize(8, 16, kmeans_init=True, decay=0.5))
    before = {name: t.clone() for name, t in layers.state_dict().items()}
    state = torch.random.get_rng_state()
    fastvq.warmup(layers, (3, 7, 6), (2, 9, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert layers.training
    for name, t in layers.state_dict().items():
        assert_same_bits(t.double(), before[name].double(), name)
    assert all(p.grad is None for p in layers.parameters())


def test_every_kernel_of_a_step_is_launched(monkeypatch):
    """What a training step and an evaluation launch afterwards is what the warm-up launched, and no more."""
    launched = []
    real = launch.launch

    def record(kernel, grid, *arguments, **options):
        launched.append((kernel.__name__, tuple(sorted(options.items(), key=str))))
        real(kernel, grid, *arguments, **options)

    from fastvq.kernels import code_gradients, code_sums, codes, ema_update, search, vector_quantize

    for module in (code_gradients, code_sums, codes, ema_update, search, vector_quantize):
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", record)
    vq = fastvq.VectorQuantize(4, 8)
    x = torch.randn(2, 5, 4, requires_grad=True)
    with fastvq.use_backend("triton"):
        fastvq.warmup(vq, (2, 5, 4))
        warmed = set(launched)
        launched.clear()
        quantized, _, loss = vq(x)
        (quantized.sum() + loss.sum()).backward()
        vq.eval()(x)
    assert {name for name, _ in launched} >= {"screen_kernel", "rescore_kernel", "update_kernel", "pull_kernel"}
    assert set(launched) <= warmed


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module; got str"):
        fastvq.warmup("vq", (1, 2))
    with pytest.raises(ValueError, match="at least one input shape"):
        fastvq.warmup(fastvq.VectorQuantize(2, 2))
