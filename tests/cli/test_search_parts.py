"""The shares of a search's parts, from what the sampling profiler prints."""

import pytest

from benchmarks.search_parts import OUTSIDE, PARTS, shares, table

REPORT = """
# Overhead\tShared Object\tSymbol
    60.00%\t_cpu.cpython-311-x86_64-linux-gnu.so\t[.] void fastvq::(anonymous namespace)::screen_int8<false>
     5.00%\t_cpu.cpython-311-x86_64-linux-gnu.so\t[.] fastvq::(anonymous namespace)::int8_candidates
     4.00%\t_cpu.cpython-311-x86_64-linux-gnu.so\t[.] fastvq::(anonymous namespace)::group_scores
     3.00%\t_cpu.cpython-311-x86_64-linux-gnu.so\t[.] fastvq::(anonymous namespace)::centre
     2.00%\t_cpu.cpython-311-x86_64-linux-gnu.so\t[.] fastvq::(anonymous namespace)::Errands::step
     1.00%\t_cpu.cpython-311-x86_64-linux-gnu.so\t[.] fastvq::(anonymous namespace)::screen_codes
     1.00%\t_cpu.cpython-311-x86_64-linux-gnu.so\t[.] void fastvq::search_head<float>
     4.00%\tlibpython3.11.so.1.0\t[.] screen
"""


def test_every_sample_has_one_part():
    found = shares(REPORT)
    wanted = {"screen": 60, "candidates": 9, "rows": 3, "errands": 2, "codes": 1, "rest": 1, OUTSIDE: 4}
    assert found == {part: pytest.approx(percent / 80) for part, percent in wanted.items()}
    assert list(found) == [*PARTS, OUTSIDE]


def test_a_report_without_the_extension_is_refused():
    with pytest.raises(ValueError, match="samples of"):
        shares("    99.00%\tlibc.so.6\t[.] memcpy\n")


def test_the_table_has_a_line_for_each_shape():
    row = {"N": 1, "K": 2, "D": 3, "ms": "4", "dots_ms": "3", **shares(REPORT)}
    row |= dict.fromkeys(("cpu", "isa", "threads", "torch", "day"), "x")
    assert "| 1, 2, 3 | 4 ms | 3 ms, 75% | 75.0% | 11.2% |" in table([row])
