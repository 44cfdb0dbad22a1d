"""The report and the demo: the pictures, and one page that needs nothing else."""

import base64
import re

import pytest
from PIL import Image

from fastvq.training import checkpoint as checkpoints

PICTURES = ("reconstructions.png", "curves.png", "codebook.png")


def check_page(folder, *words: str) -> str:
    page = (folder / "report.html").read_text()
    embedded = [base64.b64decode(image) for image in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert embedded == [(folder / name).read_bytes() for name in PICTURES]
    # Self-contained: no other source, no link, no script.
    assert len(re.findall(r"\bsrc=", page)) == len(PICTURES)
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    for name in PICTURES:
        with Image.open(folder / name) as image:
            image.load()
            assert image.width >= 100
    for word in words:
        assert word in page
    return page


def test_report_of_a_run(tmp_path, run, call):
    answer = call("report", run, "-o", tmp_path / "report")
    assert (answer.status, answer.out) == (0, f"{tmp_path / 'report' / 'report.html'}\n")
    page = check_page(tmp_path / "report", "3 steps of 4 crops", "of 20 codes", "image 9", "24 × 20")
    assert "Fused against naive" not in page
    # Ten images, of which one is held out: a column of it, over its reconstruction, five times as large.
    with Image.open(tmp_path / "report" / "reconstructions.png") as image:
        assert image.size[0] == 20 * 5


def test_report_goes_into_the_run_by_default(tmp_path, run, call):
    import shutil

    copy = shutil.copytree(run, tmp_path / "run")
    assert call("report", copy).status == 0
    check_page(copy)


@pytest.fixture
def quick_bench(monkeypatch):
    def table(shapes, seconds):
        assert seconds <= 2
        return [
            {"N": n, "K": k, "D": d, "fastvq_ms": 2.0, "naive_ms": 25.0, "chunked_ms": 9.0, "peer_ms": None}
            for n, k, d in shapes
        ]

    monkeypatch.setattr("fastvq.cli.bench.search_table", table)
    monkeypatch.setattr("fastvq.cli.bench.step_table", table)


def test_demo_trains_reports_and_can_be_called_again(tmp_path, call, quick_bench):
    out = tmp_path / "runs" / "demo"
    answer = call("demo", "--out", out, "--steps", 2)
    assert answer.status == 0
    assert answer.out.endswith(f"{out / 'report.html'}\n")
    assert "against PNG" in answer.out
    words = ("Fused against naive", "12.5×", "4.5×", "16,384 × 1,024 × 64", "astronaut", "camera", "chelsea")
    page = check_page(out, "2 steps of 16 crops", *words)
    assert (
        "vector-quantize-pytorch" not in page.split("Fused against naive")[1].split("fastvq 0")[0].split("torch 2")[0]
    )
    assert call("demo", "--out", out, "--steps", 3).status == 0
    assert checkpoints.load(out).step == 3
    check_page(out, "3 steps of 16 crops")


def test_bench_has_what_the_demo_uses():
    from fastvq.cli import bench

    (row,) = bench.search_table([(64, 8, 4)], 0.05)
    assert {"N", "K", "D", "fastvq_ms", "naive_ms", "chunked_ms"} <= row.keys()
    (row,) = bench.step_table([(64, 8, 4)], 0.05)
    assert row["fastvq_ms"] > 0
    assert "\n" not in bench.machine_line()
