"""Search: fastvq, the distance matrix, plain PyTorch in chunks, faiss, vector-quantize-pytorch."""

from contenders import every, measure

from fastvq.cli.bench import SEARCH_SHAPES
from fastvq.measure.contenders import SEARCHES, search_work

pytestmark = every(SEARCHES, SEARCH_SHAPES)


def test_search(benchmark, contender, shape):
    measure(benchmark, f"search {shape}", search_work(contender, shape))
