"""Rows sorted by code on the CPU: torch's stable sort of each problem by itself, whatever they share in one sort."""

import pytest
import torch
from guard import GuardedAllocations, guarded
from shimmed import dies

from fastvq.backends import cuda

pytestmark = pytest.mark.usefixtures("kernels")


def check(indices, k, mask=None, guard="end"):
    """Indices (H, N, Q): every problem's codes, order and starts are those of a stable sort of its column."""
    heads, _, stages = indices.shape
    left_out = (indices < 0) | (indices >= k) | (False if mask is None else ~mask.unsqueeze(2))
    wanted, order = torch.where(left_out, k, indices).sort(dim=1, stable=True)
    mine = guarded(indices, guard), None if mask is None else guarded(mask, guard)
    with GuardedAllocations(guard):
        found = cuda._rows_by_code(*mine, k, checked=False)
    for q in range(stages):
        of_stage = found.stage(q, stages)
        for head in range(heads):
            problem, codes = head * stages + q, wanted[head, :, q].contiguous()
            assert torch.equal(of_stage.keys[head].long(), codes + (problem << k.bit_length()))
            assert torch.equal(of_stage.order[head].long(), order[head, :, q])
            assert torch.equal(of_stage.starts[head], torch.searchsorted(codes, torch.arange(k + 1)))
    return found


# One bit less than 0 .. k need would lose what is left out, k, or the last code.
@pytest.mark.parametrize("k", [1, 2, 3, 255, 256, 257, 4095, 4096, 65_535, 65_536])
def test_codebooks_round_powers_of_two(k):
    for n in (1, 7, 60):
        check(torch.randint(-1, k, (1, n, 1)), k)
        check(torch.randint(max(0, k - 2), k + 2, (1, n, 1)), k)


@pytest.mark.parametrize("n", [0, 1, 7, 16, 17, 252, 1023])
@pytest.mark.parametrize(("heads", "stages"), [(1, 1), (2, 1), (1, 3), (3, 2), (5, 1)])
def test_heads_and_stages_share_one_sort(heads, stages, n):
    for k, guard in ((5, "start"), (8, "end")):
        check(torch.randint(-1, k, (heads, n, stages)), k, guard=guard)
        check(torch.randint(-1, k + 1, (heads, n, stages)), k, torch.rand(heads, n) < 0.7, guard)


def test_rows_of_a_code_keep_their_order(seed):
    for indices in (torch.zeros(1, 500, 1).long(), torch.arange(500).view(1, 500, 1) % 2, torch.full((2, 300, 1), -1)):
        check(indices, 2)


@pytest.mark.parametrize(
    ("problems", "k", "passes"),
    [(1, 1, 1), (1, 255, 1), (1, 256, 2), (2, 255, 2), (1, 1024, 2), (32, 1024, 2), (33, 1024, 3), (1, 65_536, 3)],
)
def test_passes_are_as_few_as_the_bits_allow(kernels, problems, k, passes):
    """In scratch, of which CUB takes 256 counters a pass."""
    assert kernels.sort_scratch(problems, 64, k, True, 0) == passes * 256 * 4


def test_what_one_sort_cannot_number_is_refused():
    one = torch.zeros(1, 1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^indices must be fewer than 2\^32 .*; got 3 x 2147483648$"):
        cuda._rows_by_code(one.expand(1, 1 << 31, 3), None, 4, checked=False)
    with pytest.raises(ValueError, match=r"^codes .* 32 bits.*; got 513 x 4194304$"):
        cuda._rows_by_code(one.expand(513, 1, 1), None, 1 << 22, checked=False)


@pytest.mark.parametrize(("checked", "name"), [(True, "code_sums"), (False, "codebook gradient")])
def test_an_error_names_the_operator(kernels, checked, name):
    indices, numbers, starts = torch.zeros(20).long(), torch.zeros(2, 2, 20, dtype=torch.int32), torch.zeros(3).long()
    addresses = [t.data_ptr() for t in (*numbers, starts)]
    arguments = indices.data_ptr(), 0, 1, 20, 1, 2, checked, *addresses
    with pytest.raises(RuntimeError, match=f"^fastvq CUDA operator {name}: invalid argument$"):
        kernels.sort_rows(*arguments, addresses[0], 0, 0)


def test_a_sort_on_another_stream_is_seen(kernels):
    """Of no rows, so that it is the first that is seen: no kernel comes before it."""
    code = "import torch; none = torch.zeros(1, 0, 1).long(); cuda._stream = lambda _: 4096; "
    assert "a sort on another stream" in dies(kernels, code + "cuda._rows_by_code(none, None, 3, checked=True)")


def test_torch_sorts_nothing(by_sorting, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "sort", lambda *_, **__: pytest.fail("torch.sort"))
    monkeypatch.setattr(torch, "sort", torch.Tensor.sort)
    x, indices = torch.randn(40, 3), torch.randint(5, (40,))
    cuda.code_sums(x, indices, 5, None, False)
    arguments = x, torch.ones(2), x, torch.randn(2, 5, 3), indices.unsqueeze(1).repeat(1, 2)
    cuda.residual_quantize_backward(*arguments, False, True)
