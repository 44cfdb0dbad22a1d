"""Which backend serves: the choice between Triton and CUDA C++, a pure function with a reason, and what one lacks."""

import pytest
import torch

import fastvq
from fastvq.backends import reference, select

BOTH = frozenset({"triton", "cuda"})
H100 = select.Gpu("sm_90", 132)
MI300 = select.Gpu("gfx942", 304)


def problem(operator="search", n=16384, k=1024, d=64, dtype="float32"):
    return select.Problem(operator, n, k, d, dtype)


@pytest.mark.parametrize(
    ("gpu", "able", "backend", "words"),
    [
        (select.Gpu("sm_80", 108), BOTH, "triton", "not been measured"),
        (select.Gpu("sm_80", 108), frozenset({"cuda"}), "cuda", "Triton is not there"),
        (H100, frozenset({"triton"}), "triton", "H100"),
        (MI300, BOTH, "triton", "NVIDIA"),
        (MI300, frozenset({"cuda"}), "reference", "no kernels"),
        (select.Gpu("sm_75", 40), frozenset({"cuda"}), "reference", "no kernels"),
        (select.Gpu("sm_100a", 148), frozenset({"cuda"}), "cuda", "Triton is not there"),
        (H100, frozenset(), "reference", "no kernels"),
    ],
)
def test_choice(gpu, able, backend, words):
    choice = select.choose(gpu, problem(), able)
    assert choice.backend == backend
    assert words in choice.why


@pytest.mark.parametrize(
    ("problem", "backend"),
    [
        (problem(n=65_536, k=16_384, d=8), "cuda"),
        (problem(n=1_000_000, k=65_536), "triton"),
        (problem(n=1_000_000), "triton"),
        (problem(n=1_000_000, k=65_536, d=128), "triton"),
        (problem(n=256), "cuda"),
        (problem("vector_quantize", n=65_536), "cuda"),
        (problem("ema_update_", n=1024), "cuda"),
        (problem("code_sums", n=1 << 22, d=128), "triton"),
        (problem("residual_quantize", n=6000), "triton"),
    ],
)
def test_an_h100_does_what_was_measured_on_one(problem, backend):
    choice = select.choose(H100, problem, BOTH)
    assert choice.backend == backend
    assert choice.why.startswith("H100")


def test_the_problem_of_each_operator():
    x, codebook, indices = torch.zeros(2, 5, 7), torch.zeros(2, 3, 7), torch.zeros(2, 5, dtype=torch.int64)
    loss, codebooks, losses = torch.zeros(()), torch.zeros(4, 3, 7), torch.zeros(4)
    calls = {
        "search": (x, codebook, "euclidean", False, "exact"),
        "vector_quantize": (x, codebook, "euclidean", 1.0, 1.0, None),
        "vector_quantize_counted": (x, codebook, "euclidean", 1.0, 1.0, None),
        "vector_quantize_backward": (x, loss, x, codebook, indices, None, 1.0, 1.0, True, True),
        "code_sums": (x, indices, 3, None, True),
        "residual_quantize": (x, codebooks, "euclidean"),
        "residual_quantize_backward": (x, losses, x, codebooks, indices, True, True),
    }
    for operator, arguments in calls.items():
        assert select.problem_of(operator, arguments) == select.Problem(operator, 10, 3, 7, "float32")
    state = codebook, torch.zeros(2, 3), codebook, torch.zeros(2, 3), codebook, 0.9, 1e-5
    assert select.problem_of("ema_update_", state) == select.Problem("ema_update_", 6, 3, 7, "float32")


def test_what_a_backend_leaves_out_is_made_of_its_own_operators(monkeypatch):
    """Not of those of the backend that would serve a call without a name."""
    called = []
    for served in (reference.code_sums, reference.ema_update_):

        def noted(*arguments, served=served):
            called.append(served.__name__)
            return served(*arguments)

        monkeypatch.setattr(reference, served.__name__, noted)
    state = torch.randn(3, 7), torch.ones(3), torch.randn(3, 7)
    fastvq.ema_step_(*state, torch.randn(5, 7), torch.zeros(5, dtype=torch.int64), decay=0.9, backend="reference")
    assert called == ["code_sums", "ema_update_"]
