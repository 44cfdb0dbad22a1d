"""What the operators launch: on meta tensors, where a call that waited for the device would be an error."""

import pytest
import torch
from fastvq.kernels import launch

from fastvq.backends import triton

SORT = ["key_kernel", "starts_kernel"]


def launched(call):
    """The names of the kernels that a call starts."""
    names = []
    with launch.taken_by(lambda kernel, *rest, **options: names.append(kernel.fn.__name__), launch.DEVICES["sm_90"]):
        call()
    return names


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("n", "levels"), [(0, 1), (256, 1), (257, 2), (65_537, 3), (16_777_217, 4)])
def test_no_operator_waits_for_the_device(n, levels):
    x, codebook, codebooks, mask = empty(n, 48), empty(1000, 48), empty(2, 1000, 48), empty(n, dtype=torch.bool)
    indices, loss = empty(n, dtype=torch.int64), empty()
    more = ["sum_chunks_kernel"] * (levels - 1)
    assert launched(lambda: triton.code_sums(x, indices, 1000, mask, False)) == [*SORT, "sum_rows_kernel", *more]
    tensors = codebook, empty(1000), codebook, empty(1000), codebook
    assert launched(lambda: triton.ema_update_(*tensors, 0.9, 1e-5)) == ["total_kernel", "update_kernel"]
    gradient = ["sum_differences_kernel", *more]
    arguments = x, loss, x, codebook, indices, mask, 0.25, 1.0, True, True
    assert launched(lambda: triton.vector_quantize_backward(*arguments)) == ["pull_kernel", *SORT, *gradient]
    stages = empty(n, 2, dtype=torch.int64)
    arguments = x, empty(2), x, codebooks, stages, True, True
    found = launched(lambda: triton.residual_quantize_backward(*arguments))
    assert found == ["pull_stages_kernel", *SORT, *gradient, *gradient]
    forward = launched(lambda: triton.vector_quantize(x, codebook, "euclidean", 0.25, 1.0, mask))
    assert forward[-2:] == ["gather_kernel", "loss_kernel"]
