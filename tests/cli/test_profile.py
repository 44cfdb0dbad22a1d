"""`fastvq profile`: what it measures, writes and draws, at sizes that take no time."""

import json

import pytest
import torch
from PIL import Image

from fastvq.cli import profile
from fastvq.measure import contenders, device
from fastvq.measure.table import read_csv


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(profile, "QUICK_SIZES", [16, 8192])
    monkeypatch.setattr(profile, "MOST_NAIVE_BYTES", 300 * 16 * 4)
    monkeypatch.setattr(profile, "SECONDS", 0.001)
    monkeypatch.setattr(device, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(contenders, "_PEAK_ROUNDS", 1 << 12)


def test_profile(tmp_path, call, small):
    out = tmp_path / "runs" / "profile"
    answer = call("profile", "--quick", "--rows", 300, "--dims", 3, 40, "--out", out)
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[-3:] == [str(out / name) for name in ("profile.csv", "profile.png", "trace.json")]
    rows = read_csv(out / "profile.csv")
    assert [(row["rows"], row["codebook_size"], row["dim"]) for row in rows] == [
        ("300", k, d) for d in ("3", "40") for k in ("16", "8192")
    ]
    for row in rows:
        n, k, d = (int(row[name]) for name in ("rows", "codebook_size", "dim"))
        assert float(row["gops"]) == pytest.approx(2 * n * k * d / float(row["p50_ms"]) / 1e6, abs=0.1)
        assert float(row["intensity"]) == pytest.approx(2 * n * k * d / (4 * n * d + 4 * k * d + 8 * n), abs=0.01)
        assert int(row["calls"]) >= 3
        assert row["naive_measured"] == str(k == 16)
        assert float(row["peak_mib"]) < 8
        assert min(float(row[limit]) for limit in ("copy_gbs", "float32_gops")) > 0
        assert (row["backend"], row["threads"]) == ("cpu", "1")
        assert 0 <= float(row["exact"]) <= float(row["second_look"]) <= 1
    assert float(rows[1]["naive_mib"]) == 2 * 300 * 8192 * 4 / 2**20
    events = {event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {"fastvq::search", "search N=300 K=16 D=40", "search N=300 K=8192 D=40"} <= events
    with Image.open(out / "profile.png") as image:
        assert image.width > 1000


def test_without_the_extension_matrix_products_are_the_limit(monkeypatch):
    monkeypatch.setattr("fastvq.backends.cpu._kernels", None)
    monkeypatch.setattr("fastvq.backends.cpu._import_error", "none built", raising=False)
    monkeypatch.setattr(device, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(device, "MATMUL_SIDE", {"cpu": 64})
    found = device.limits(torch.device("cpu"))
    assert list(found.rates) == ["float32"]
    assert found.rates["float32"] > 0


def test_profile_into_a_file(tmp_path, call):
    (tmp_path / "file").write_text("")
    answer = call("profile", "--out", tmp_path / "file")
    assert (answer.status, answer.err) == (2, f"fastvq profile: error: --out {tmp_path / 'file'} is not a folder\n")
