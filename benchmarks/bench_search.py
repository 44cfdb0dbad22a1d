"""Search: fastvq, the distance matrix, plain PyTorch in chunks, vector-quantize-pytorch."""

from contenders import EVERY, measure

pytestmark = EVERY


def test_search(benchmark, contender, shape):
    measure(benchmark, "search", contender, shape)
