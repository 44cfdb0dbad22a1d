"""The strided layers: exact halves and doubles, and each the other backwards."""

import pytest
import torch

from fastvq.models.blocks import Double, Halve


@pytest.mark.parametrize("kernel", [3, 4])
def test_double_is_halve_backwards(kernel):
    halve = Halve(3, 5, kernel).double()
    double = Double(5, 3, kernel).double()
    double.weight.data = halve.weight.data
    torch.nn.init.zeros_(halve.bias)
    torch.nn.init.zeros_(double.bias)
    x, y = torch.randn(2, 3, 14, 22).double(), torch.randn(2, 5, 7, 11).double()
    # <A x, y> = <x, A^T y>
    torch.testing.assert_close((halve(x) * y).sum(), (x * double(y)).sum())


def test_window_of_3_pads_the_end_alone_as_keras_does():
    halve = Halve(1, 1, 3)
    torch.nn.init.ones_(halve.weight)
    torch.nn.init.zeros_(halve.bias)
    sums = halve(torch.ones(1, 1, 6, 6))[0, 0]
    assert sums.tolist() == [[9, 9, 6], [9, 9, 6], [6, 6, 4]]
