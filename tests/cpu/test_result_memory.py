"""Memory of large results: kept for reuse, never shared by two results that are alive."""

import torch

import fastvq

X, CODES = torch.randn(8192, 64), torch.randn(64, 64)  # 2 MiB a result


def quantized() -> torch.Tensor:
    return fastvq.vector_quantize(X, CODES, backend="cpu")[0]


def test_a_result_is_an_ordinary_tensor() -> None:
    result = quantized()
    assert not result._is_view()
    assert result.is_contiguous()
    assert result.data_ptr() % 64 == 0
    assert torch.equal(result.clone().mul_(2), result + result)


def test_memory_let_go_is_used_again_and_memory_in_use_is_not() -> None:
    first = quantized()
    alias, kept = first[5:], first.clone()
    address = first.data_ptr()
    del first
    others = [quantized() for _ in range(3)]
    assert address not in {other.data_ptr() for other in others}
    assert len({other.data_ptr() for other in others}) == 3
    assert torch.equal(alias, kept[5:])
    addresses = {other.data_ptr() for other in others}
    del others
    assert quantized().data_ptr() in addresses
