"""`fastvq bench`: rivals that do the same work, rows that say what was measured, the page and the plot of them."""

import io
import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastvq
from fastvq.cli import bench
from fastvq.measure import contenders, timing
from fastvq.measure.data import FAMILIES, draw
from fastvq.measure.table import fill_table, read_csv
from fastvq.measure.worker import Worker

ROOT = Path(__file__).parents[2]
SHAPE = (257, 33, 7)


# ---- contenders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", contenders.SEARCHES)
def test_every_contender_finds_the_nearest_codes(contender):
    for changed in (True, False):
        work = contenders.search_work(contender, SHAPE, "gaussian", changed)
        work.once()
        assert torch.equal(work.call(), fastvq.search(*draw(SHAPE)))


@pytest.mark.parametrize("contender", contenders.STEPS)
def test_every_contender_takes_the_same_training_step(contender):
    mine, other = (contenders.LAYERS[name](draw(SHAPE)[1]) for name in ("fastvq", contender))
    for step in range(2):
        x = torch.randn(100, SHAPE[2], requires_grad=True)
        for wanted, found in zip(mine(x), other(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=f"step {step}")
    gradients = [contenders.step_work(name, SHAPE).call() for name in ("fastvq", contender)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("operator", ["search", *contenders.OPERATORS])
def test_an_operator_by_itself_does_what_it_does_in_a_step(operator):
    work = contenders.operator_work(operator, SHAPE)
    for _ in range(2):
        work.once()  # always the first step from new codes
    work.before()
    found = work.call()
    x, codebook = draw(SHAPE)
    indices = fastvq.search(x, codebook)
    if operator == "search":
        assert torch.equal(found, indices)
    elif operator == "vector_quantize":
        assert torch.equal(found[1], indices)
        assert found[2].requires_grad
    elif operator == "ema_step_":
        assert found is None
    else:
        torch.testing.assert_close(found, contenders.step_work("fastvq", SHAPE).call())


def test_every_contender_takes_the_same_residual_stages():
    found = {name: contenders.residual_work(name, (3, 40), 4, (120, 16, 5)).call() for name in contenders.RESIDUALS}
    for quantized, indices, *_ in found.values():
        assert torch.equal(indices, found["fastvq"][1])
        torch.testing.assert_close(quantized, found["fastvq"][0])


def test_a_changed_codebook_is_another_each_time_and_stays_near():
    codebook = torch.randn(8, 3)
    first, seen = codebook.clone(), []
    change = contenders._changing(codebook)
    for _ in range(4):
        change()
        assert not seen or not torch.equal(codebook, seen[-1])
        seen.append(codebook.clone())
    torch.testing.assert_close(codebook, first, rtol=1e-5, atol=0)


def test_families_are_what_they_are_called():
    assert all(len(codes.unique(dim=0)) == 50 for _, codes in (draw((60, 50, 4), family) for family in FAMILIES))
    assert draw((60, 50, 4), "fresh codebook")[1].abs().max() <= 1 / 50
    x, codes = draw((4000, 50, 4), "outlier dimension")
    assert x.std(0).argmax() == codes.std(0).argmax() == 2
    assert 40 < x.std(0).max() / x.std(0).min() < 60


# ---- timing -----------------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    order = []

    def turn(name):
        return lambda: order.append(name) or [2.0, 1.0]

    times = timing.interleave({name: turn(name) for name in "ab"}, 0, 3)
    assert "".join(order) == "ab" * 4
    assert times == {name: [1.0] * 3 + [2.0] * 3 for name in "ab"}


def test_percentiles_are_nearest_ranks():
    values = [float(v) for v in range(1, 11)]
    assert [timing.percentile(values, p) for p in (20, 50, 80)] == [2.0, 5.0, 8.0]
    assert timing.percentile([7.0], 20) == 7.0


def test_what_happens_before_a_call_is_not_timed_and_the_first_call_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "TURN", 0.1)
    calls = []
    work = timing.Work(lambda: calls.append("call"), lambda: (calls.append("before"), torch.randn(200, 200)))
    times = work.turn()
    assert calls[:4] == ["before", "call", "before", "call"]
    assert len(times) == len(calls) / 2 - 1
    assert len(timing.Work(lambda: calls.append(time.sleep(0.04))).turn()) <= 3


def test_a_worker_answers_prints_elsewhere_and_tells_what_failed():
    with Worker({"FASTVQ_CPU_ISA": "portable"}) as worker:
        assert worker.call(torch.get_num_threads) == torch.get_num_threads()
        assert worker.call(print, "not an answer") is None
        assert worker.call(bench.machine)["isa"] == "portable"
        with pytest.raises(RuntimeError, match=r"(?s)int\('seven',\) failed:.*ValueError: invalid literal"):
            worker.call(int, "seven")
        with pytest.raises(RuntimeError, match="died: 3"):
            worker.call(os._exit, 3)


# ---- the command ------------------------------------------------------------------------------------------------


class Here:
    """A worker that is this process: starting others takes seconds."""

    def __init__(self, environment=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, function, *arguments):
        return function(*arguments)

    def turn(self, make, *arguments):
        return make(*arguments).turn


@pytest.fixture
def small(monkeypatch):
    """Everything is small, and in this process."""
    monkeypatch.setattr(bench, "Worker", Here)
    monkeypatch.setattr(timing, "TURN", 0.0)
    monkeypatch.setattr(bench, "QUICK_SHAPES", [SHAPE])
    monkeypatch.setattr(bench, "LARGEST", (300, 300, 4))
    monkeypatch.setattr(bench, "MOST_NAIVE_BYTES", SHAPE[0] * SHAPE[1] * 4)
    monkeypatch.setattr(bench, "RESIDUAL_SHAPE", (16, 8, 4))
    monkeypatch.setattr(bench, "RESIDUAL_BATCH", (4, 4))
    monkeypatch.setattr(bench, "MODEL_SIDE", 8)
    monkeypatch.setattr(bench, "MODEL_SHAPE", (64, 8, 4))
    torch.set_num_threads(2)


def test_all_parts_and_what_is_made_of_them(small, tmp_path, call, monkeypatch):
    path = tmp_path / "cpu.csv"
    answer = call("bench", "--quick", "--csv", path)
    assert answer.status == 0, answer.err
    rows = read_csv(path)
    assert {row["part"] for row in rows} == set(bench.PARTS)
    search = {(r["case"], r["allocator"], r["contender"]): r for r in rows if r["part"] == "search"}
    peaks = {"float32 peak", "int8 peak"} if contenders.peak_operations("int8", 1) else {"float32 peak"}
    assert {name for *_, name in search} == {*contenders.SEARCHES, *peaks}
    for case in ("codebook changed", "codebook unchanged"):
        own, peak = (search[case, "kept", name] for name in ("fastvq", "float32 peak"))
        n, k, d = SHAPE
        assert float(own["gflops"]) == pytest.approx(2 * n * k * d / float(own["p50_ms"]) / 1e6, rel=0.05, abs=0.1)
        assert float(own["of_float32_peak"]) == pytest.approx(float(own["gflops"]) / float(peak["gflops"]), abs=0.01)
        assert float(own["ratio"]) == 1
        assert float(own["p20_ms"]) <= float(own["p50_ms"]) <= float(own["p80_ms"])
        assert all(own[column] for column in ("cpu", "isa", "torch", "faiss", "peer", "day"))
    operators = {r["contender"]: r for r in rows if r["part"] == "operators"}
    assert {*operators} == {"fastvq", "search", *contenders.OPERATORS, *peaks, "copy"}
    for name, row in operators.items():
        moves = name in ("ema_step_", "backward", "copy")
        assert (bool(row["gbs"]), bool(row["gflops"])) == (moves, not moves)
        assert bool(row["ratio"]) == (name not in {*peaks, "copy"})
    backward = operators["backward"]
    bytes_moved = 3 * 4 * n * d + 8 * n + 4 * k * d
    assert float(backward["gbs"]) == pytest.approx(bytes_moved / float(backward["p50_ms"]) / 1e6, rel=0.05, abs=0.1)
    assert {(r["contender"], r["threads"]) for r in rows if r["part"] == "threads"} >= {("fastvq", t) for t in "12"}
    data = {r["case"]: float(r["p50_ms"]) for r in rows if r["part"] == "data" and r["contender"] == "fastvq"}
    assert list(data) == [*FAMILIES, *(f"{family}, codebook unchanged" for family in FAMILIES)]
    memory = {(r["case"], r["N"], r["contender"]) for r in rows if r["part"] == "memory"}
    assert memory == {(c, n, name) for c in ("search", "step") for n, name in [("257", "fastvq"), ("257", "naive")]} | {
        (c, "300", "fastvq") for c in ("search", "step")
    }

    # A part again: its rows are new, the others' stay.
    path.write_text(path.read_text().replace(f",{rows[0]['day']}", ",2001-02-03"))
    assert call("bench", "residual", "--quick", "--csv", path).status == 0
    assert {row["part"] for row in read_csv(path) if row["day"] != "2001-02-03"} == {"residual"}
    assert [row["part"] for row in read_csv(path)] == [row["part"] for row in rows]

    # The page and the plot.
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import plot, table

    summary = table.Summary(read_csv(path))
    text = table.readme(summary) + table.measurements(summary)
    for suffix, key in (("", "{}"), (", unchanged", "{}, codebook unchanged")):
        shares = [data[key.format("gaussian")] / data[key.format(family)] for family in FAMILIES]
        (line,) = [line for line in summary.data().splitlines() if line.startswith(f"| 257, 33, 7{suffix} |")]
        assert [cell.split(" ")[0] for cell in line.split(" | ")[1:]] == [f"{share:.2f}" for share in shares]
    for words in (
        "257, 33, 7, unchanged",
        "## What a training step is made of",
        "## Kinds of data",
        "## Threads",
        "## In a model",
        "16 images",
    ):
        assert words in text
    with Image.open(io.BytesIO(plot.draw(read_csv(path)))) as image:
        assert image.width > 1000


def test_a_foreign_file_is_left_alone(tmp_path, call):
    path = tmp_path / "notes.csv"
    path.write_text("a,b\n1,2\n")
    answer = call("bench", "model", "--csv", path)
    assert (answer.status, path.read_text()) == (2, "a,b\n1,2\n")
    assert "holds other columns than fastvq bench writes" in answer.err


def test_an_unknown_part(call):
    answer = call("bench", "speed")
    assert answer.status == 2
    assert answer.err == (
        "fastvq bench: error: PART must be one of search, step, operators, data, residual, threads, model, memory; "
        "got speed\n"
    )


def test_the_readme_says_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import table

    summary, page = table.Summary(read_csv(table.RESULTS)), tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text())
    fill_table(page, "python -m benchmarks.table", table.readme(summary))
    assert page.read_text() == (ROOT / "README.md").read_text()
    assert (ROOT / "docs" / "measurements.md").read_text() == table.measurements(summary)


def test_the_loops_in_registers_do_what_they_say():
    """More rounds take more time: nothing was optimised away."""
    from fastvq.backends import cpu

    loops = [getattr(cpu.extension(), f"{unit}_operations") for unit in contenders.UNITS]
    for loop in loops:
        done = loop(1 << 10, 1)
        assert loop(1 << 11, 1) == 2 * done
        assert loop(1 << 10, 2) == 2 * done
        if done:
            one, four = (min(thread_seconds(loop, rounds, 1) for _ in range(5)) for rounds in (1 << 18, 1 << 20))
            assert four > 2 * one


def thread_seconds(function, *arguments):
    """Of this thread's own, however busy the machine is."""
    start = time.thread_time()
    function(*arguments)
    return time.thread_time() - start
