"""The ways of a CPU search: the same indices by each, and the table by which one is chosen."""

from __future__ import annotations

import pytest
import torch

from benchmarks import search_ways
from fastvq.backends import cpu, reference
from fastvq.measure.table import read_csv


@pytest.mark.parametrize(("n", "k", "d"), [(1, 16, 4), (3, 1, 1), (17, 9, 7), (5, 1000, 64), (40, 300, 33)])
@pytest.mark.parametrize("way", ["few", "kept", "float32", "int8"])
def test_every_way_finds_the_same_codes(way: str, n: int, k: int, d: int) -> None:
    generator = torch.Generator().manual_seed(n * k * d)
    codebook = torch.randn(k, d, generator=generator)
    x = codebook[torch.randint(k, (n,), generator=generator)] + 0.3 * torch.randn(n, d, generator=generator)
    want, _ = reference.search(x, codebook, "euclidean", False, "exact")
    for _ in range(2):  # kept codes are found in the second call
        assert torch.equal(cpu.search_by(way, x, codebook), want)


def test_other_codes_are_refused() -> None:
    x, codebook = torch.zeros(2, 4), torch.zeros(3, 4)
    for odd in (codebook.double(), codebook.t().contiguous().t()):
        with pytest.raises(ValueError, match="x and codebook must be float32"):
            cpu.search_by("few", x, odd)


def test_the_table_is_that_of_the_measurements() -> None:
    rows = read_csv(search_ways.RESULTS)
    assert search_ways.TABLE.read_text() == search_ways.table(rows)
    for row in rows:
        k, d = int(row["K"]), int(row["D"])
        way = int(row["few_rows"]), row["int8"] == "1"
        assert cpu.search_way(k, d) == cpu.search_way(round(1.2 * k), d) == way


def test_shapes_past_the_table_take_the_next() -> None:
    assert cpu.search_way(1, 1) == cpu.search_way(search_ways.SIZES[0], search_ways.WIDTHS[0])
    assert cpu.search_way(1 << 24, 1 << 14) == cpu.search_way(search_ways.SIZES[-1], search_ways.WIDTHS[-1])
